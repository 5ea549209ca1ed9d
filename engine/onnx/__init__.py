"""ONNX folders: a model as a graph that onnxruntime computes, made, compared with its source, written and opened."""
