"""Runnable Beam pipelines: `python -m pipelines.refit --config job.yaml`, on any of Beam's runners."""
