"""The NPU of AMD laptops through XRT. So far: what its kernels compute (`arithmetic`) and their sizes (`designs`)."""


def open_device(selector: str) -> str:
    """Why there is no NPU: nothing in this version drives one."""
    return "this version has kernels for it, but no runtime that drives them"
