"""The running state of a cycle: signals in, the next keep ratio out, one state on all ranks."""
