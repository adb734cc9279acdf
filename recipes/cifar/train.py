"""
Train an image classifier, plain or with DAREL, by the YAML file that comes first.

One GPU:
    accelerate launch --config_file recipes/accelerate/single_gpu.yaml \
        recipes/cifar/train.py recipes/cifar/resnet18_cifar100.yaml

Your own images (train.parquet and test.parquet with img and label, or train/ and test/ with a folder a class), on
whatever machine (every key of the YAML file is an option, and the option wins):
    python recipes/cifar/train.py recipes/cifar/resnet18_cifar10.yaml --output_dir outputs/quick \
        --data_dir FOLDER --narrow 4 --max_train_samples 3000 --num_train_epochs 5 --bf16 false

The output folder ends with the weights, results.json, and what DAREL did: darel/report.json, losses.png,
embeddings.png, removed_kept.png.
"""

from transformers import TrainingArguments

from darel_hf import DarelConfig
from darel_hf.jobs import parse_settings
from darel_hf.vision.task import ImageArguments, run

if __name__ == "__main__":
    task, darel, training = parse_settings((ImageArguments, DarelConfig, TrainingArguments))
    results = run(task, darel, training)
    if training.process_index == 0:
        for key, value in results.items():
            print(f"{key}: {value}")
