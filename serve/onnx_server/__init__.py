"""The server of ONNX folders: onnxruntime-genai behind the front, in this process."""
