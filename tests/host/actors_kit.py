"""Ray actors that answer as Raylight's workers do, on the CPU; imported by the actors' processes."""

import sys

PARALLEL = {"is_xdit": False, "ulysses_degree": 1, "ring_degree": 1, "cfg_degree": 1}


class Runner:
    """The methods of Raylight's worker that custom nodes use, and a sampler."""

    def __init__(self, model=None, parallel=PARALLEL):
        self.model, self.parallel = model, parallel

    def get_parallel_dict(self):
        return self.parallel

    def model_function_runner(self, fn, *args, **kwargs):
        self.model = fn(self.model, *args, **kwargs)

    def model_function_runner_get_values(self, fn, *args, **kwargs):
        return fn(self.model, *args, **kwargs)

    def end(self):
        import os

        os._exit(1)


class Worker(Runner):
    """With the tiny model in a ComfyUI of its own."""

    def __init__(self, comfy, folder, parallel=PARALLEL):
        super().__init__(parallel=parallel)
        sys.path.insert(0, comfy)
        sys.argv = ["main.py", "--cpu"]
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.sample
        import comfy.sd
        import torch

        torch.set_num_threads(1)
        self.model = comfy.sd.load_diffusion_model(folder, model_options={"dtype": torch.float32})

    def sample(self, seed):
        import comfy.sample
        import torch

        latent = torch.zeros(1, 16, 5, 16, 16)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
        text = torch.randn(1, 4, 4096, generator=torch.Generator().manual_seed(2))
        with torch.inference_mode():
            return comfy.sample.sample(self.model, noise, 3, 1.0, "euler", "simple", [[text, {}]], [[text, {}]], latent,
                                       seed=seed, disable_pbar=True)
