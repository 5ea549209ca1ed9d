"""int8 models from fp32 ONNX folders, with layers that stay float where the accuracy asks for it."""
