#!/bin/sh
# Make the secrets of compose.yaml where they are missing, and print what a person must know.
set -eu
cd "$(dirname "$0")"
umask 077
mkdir -p secrets
if [ -e secrets/orthanc-users.json ]; then
  echo "expected no docker/secrets/orthanc-users.json, found one: it stays as it is" >&2
  exit 1
fi
password=$(od -An -N18 -tx1 /dev/urandom | tr -d ' \n')
printf '{ "RegisteredUsers": { "orthanc": "%s" } }\n' "$password" >secrets/orthanc-users.json
# Compose mounts it as it is, and Orthanc's image reads it as a user of its own: the folder keeps others out.
chmod 644 secrets/orthanc-users.json
# These too are mounted as they are, whatever umask the checkout was made with.
chmod a+r appliance.toml appliance.gpu.toml orthanc.json
echo "Orthanc's page: http://localhost:8042, user orthanc, password $password"
