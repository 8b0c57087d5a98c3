"""The tutorial's training program: MobileNetV1, image data, the training loop and the demo."""
