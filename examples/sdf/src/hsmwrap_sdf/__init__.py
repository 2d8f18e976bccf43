"""An hsmwrap backend over the SDF interface of Chinese HSMs (GM/T 0018)."""

from hsmwrap_sdf.backend import SdfBackend
from hsmwrap_sdf.settings import SdfSettings

__all__ = ["SdfBackend", "SdfSettings"]
