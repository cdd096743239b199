"""Networks in the files of other frameworks, read without executing anything in them."""

from convexbn.files.torch.read import Checkpoint, is_checkpoint, read_checkpoint

__all__ = ["Checkpoint", "is_checkpoint", "read_checkpoint"]
