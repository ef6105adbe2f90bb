"""What the daemon is told: the strict model of `appliance.toml`, every default in one place.

Paths are absolute. Times are in seconds, sizes in bytes.
"""

from dints_deploy.config.appliance import Config
from dints_deploy.config.load import load_config

__all__ = ["Config", "load_config"]
