"""`credits up`: servers, worker, gateway, a story and a live view in one foreground process.

Hides how a whole stack lives and dies: see `bring_up`.
"""

from workers.up.stack_file import Stack, read_stack, stack_path

__all__ = ["Stack", "read_stack", "stack_path"]
