"""Fine-tune chat models on data that cannot be fully trusted, and keep them safe."""
