"""``regimewrap train``: any folder of pictures, any model of timm, one file that predicts at every budget.

``pictures`` makes batches of a folder, ``run`` is the loop, which goes on exactly where it stopped, ``folder`` what it
leaves, ``saved`` the one file, ``uses`` what can be done with it. A room and not an adapter: it is built on timm's and
torchvision's parts, and is a loop of its own. Needs the extra ``cli``.
"""

from importlib.util import find_spec

from regimewrap.errors import MissingExtraError

for _package in ("timm", "torchvision"):
    if find_spec(_package) is None:
        raise MissingExtraError(_package, "cli")
