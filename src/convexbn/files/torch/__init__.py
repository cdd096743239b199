"""Networks in files of other frameworks; reading executes nothing in them."""

from convexbn.files.torch.read import Checkpoint, is_checkpoint, read_checkpoint

__all__ = ["Checkpoint", "is_checkpoint", "read_checkpoint"]
