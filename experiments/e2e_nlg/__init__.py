from importlib.util import find_spec

if missing := [
    name for name in ("grain", "matplotlib", "safetensors", "tokenizers", "tqdm") if find_spec(name) is None
]:
    raise ModuleNotFoundError(f'experiments.e2e_nlg needs {missing}; run: pip install -e ".[experiments]"')
