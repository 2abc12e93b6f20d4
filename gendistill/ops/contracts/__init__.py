"""The kernels as torch ops: schemas, fake tensors, autograd and ``torch.compile`` without graph breaks.

One module per family. Torch alone understands them: a family's kernels are imported where the first of them is
launched. They are looked up by name (``gendistill.ops.select.contract``), so that a student's exported code, which
carries none of them, still imports.
"""
