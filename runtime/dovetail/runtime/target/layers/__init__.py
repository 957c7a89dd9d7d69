"""The target's first layers on a GPU: their ONNX graph, its attention, its session, the texts it holds."""
