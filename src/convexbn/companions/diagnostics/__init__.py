"""Diagnostics of what batch norm does to a network: moments, gradients, noise and landscape of any torch module.

Measures of Bjorck, Gomes, Selman, Weinberger, "Understanding Batch Normalization", NeurIPS 2018. None of them changes
the module, its buffers or gradients, its mode, or the global random state.
"""

from convexbn.companions.diagnostics.gradients import SignAgreement, gradient_kurtosis, sign_agreement
from convexbn.companions.diagnostics.landscape import gradient_step, relative_losses
from convexbn.companions.diagnostics.moments import ChannelMoments, channel_moments
from convexbn.companions.diagnostics.noise import GradientNoise, gradient_noise, sampled_noise
from convexbn.companions.diagnostics.product_spectrum import FussCatalan, product_spectrum

__all__ = [
    "ChannelMoments", "FussCatalan", "GradientNoise", "SignAgreement", "channel_moments", "gradient_kurtosis",
    "gradient_noise", "gradient_step", "product_spectrum", "relative_losses", "sampled_noise", "sign_agreement",
]  # fmt: skip
