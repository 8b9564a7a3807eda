"""What this machine's processor does to 8-bit integers."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

_X86 = ("x86_64", "amd64", "i386", "i686")
_WITH_VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")


@cache
def processor_facts() -> dict[str, str]:
    """Read what Linux tells of the processor, by name, such as ``"model name"`` and ``"flags"``; empty elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    facts: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            facts[key.strip()] = value.strip()
    return facts


def saturates() -> bool:
    """Check whether int8 kernels of this machine saturate: an x86 processor without VNNI, told by Linux.

    Its instruction ``vpmaddubsw`` adds two products of a uint8 and an int8 in 16 bits: ``255 x 127`` twice is cut off.
    With weights of 7 bits no pair is (:func:`qzoo.export_onnx`, ``reduce_range=True``). ``ONEDNN_MAX_CPU_ISA``, by
    which oneDNN (in OpenVINO) is kept from newer instructions, counts too.

    Returns:
        True there; False with VNNI, on other processors, and where the processor is not known.

    Example:
        >>> saturates() in (True, False)
        True
    """
    if platform.machine().lower() not in _X86:
        return False
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if most in ("SSE41", "AVX", "AVX2", "AVX512_CORE"):
        return True
    flags = processor_facts().get("flags", "").split()
    return bool(flags) and not any(flag in flags for flag in _WITH_VNNI)
