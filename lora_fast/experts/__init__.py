"""The experts of a Mixture-of-Experts layer with LoRA: their form, the operator, what it is called on."""
