"""Latent-variable models: pure functions of parameters and statistics."""

from stream_em.models.mixture import Mixture, MixtureParameters, Posterior

__all__ = ["Mixture", "MixtureParameters", "Posterior"]
