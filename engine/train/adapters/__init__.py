"""What a run does with adapters besides training them: move AdaLoRA's budget, prove that all of them moved."""
