"""A picture without ComfyUI: what is asked for, how it is sampled, and the demo model."""
