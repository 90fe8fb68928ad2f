"""Where each kernel is registered: reference, Triton launcher, shapes of real models and roofline costs.

`registry.py` lists the kernels for tests, profiles and benches; `kernels.ops` takes the layer operations of a
decoder from `layers.py`; `aot_compile.py` compiles without a GPU. Start in `spec.py`.
"""
