"""`python -m dints_deploy` is the command line."""

from dints_deploy.cli.main import main

main()
