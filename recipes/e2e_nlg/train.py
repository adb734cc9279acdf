"""
Fine-tune GPT-2 on E2E-NLG with LoRA and DAREL.

One GPU:
    accelerate launch --config_file recipes/accelerate/single_gpu.yaml \
        recipes/e2e_nlg/train.py recipes/e2e_nlg/gpt2_small.yaml

Two GPUs:
    accelerate launch --config_file recipes/accelerate/ddp_2gpu.yaml \
        recipes/e2e_nlg/train.py recipes/e2e_nlg/gpt2_medium.yaml

Your own files, a quick run, other fractions (every key of the YAML file is an option, and the option wins):
    python recipes/e2e_nlg/train.py recipes/e2e_nlg/gpt2_small.yaml --output_dir outputs/quick \
        --data_dir FOLDER --model_name_or_path FOLDER --max_train_samples 2000 --offline_keep 0.7

The folder has trainset.csv, devset.csv and testset_w_refs.csv of the challenge, columns `mr,ref`. The output folder
ends with the adapter, predictions.txt, results.json, and what DAREL did: darel/report.json, dropped.csv, losses.png.
"""

from transformers import TrainingArguments

from darel_hf import DarelConfig
from darel_hf.jobs import parse_settings
from darel_hf.nlg.task import NLGArguments, run

if __name__ == "__main__":
    task, darel, training = parse_settings((NLGArguments, DarelConfig, TrainingArguments))
    results = run(task, darel, training)
    if training.process_index == 0:
        for key, value in results.items():
            print(f"{key}: {value}")
