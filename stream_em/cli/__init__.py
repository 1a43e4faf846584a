"""The command `stream-em`: streaming clusters and anomaly scores from a YAML file."""
