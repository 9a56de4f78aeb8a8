"""Files: adapters in PEFT's format and torchtune's, base checkpoints; read with suspicion, written whole."""
