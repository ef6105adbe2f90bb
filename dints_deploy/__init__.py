"""The appliance: segment 3-D medical scans with networks of the zoo. Needs neither torch nor MONAI. Research use only."""
