"""From a folder of JPEGs to a trained image classifier: DALI, 1cycle, progressive resizing, DDP.

Importing the package is cheap: torch and DALI are imported by the modules that use them.
"""

from __future__ import annotations

from fastimagenet.lr_finder import lr_find2

__all__ = ["lr_find2"]
__version__ = "0.1.0"
