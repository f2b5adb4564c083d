"""How the kernels take the place of the experts in models of transformers and diffusers."""
