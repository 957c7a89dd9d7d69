"""The drafter on GPUs of any make, by the WebGPU plugin of ONNX Runtime."""
