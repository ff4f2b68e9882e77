"""From a trained model to folders that others load: stock classes, timm, ONNX, research code; and the way back."""
