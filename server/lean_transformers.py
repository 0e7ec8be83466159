"""Import transformers' model code without SciPy: only losses of object detectors use it, and it costs a server 37 MB.

Import this before anything that imports models. SciPy is hidden from transformers only while it is imported here.
"""

import sys

import transformers.utils

_is_scipy_available = transformers.utils.is_scipy_available

if "transformers.modeling_utils" not in sys.modules:
    transformers.utils.is_scipy_available = lambda: False
    try:
        import transformers.modeling_utils
    finally:
        transformers.utils.is_scipy_available = _is_scipy_available
