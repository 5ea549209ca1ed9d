"""DeepSpeed JSONs as users write them: what each comes to, or what the refusal says."""

from __future__ import annotations

from typing import Any

#: as users of Hugging Face's Trainer write it for ZeRO-2 with the optimizer on the CPU
HF_ZERO_2: dict[str, Any] = {
    "fp16": {
        "enabled": "auto", "loss_scale": 0, "loss_scale_window": 500, "initial_scale_power": 12, "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "allgather_partitions": True,
        "allgather_bucket_size": 2e8, "overlap_comm": True, "reduce_scatter": True, "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
}  # fmt: skip
#: and for ZeRO-3 with optimizer and parameters on the CPU
HF_ZERO_3: dict[str, Any] = HF_ZERO_2 | {
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": "auto", "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto",
        },
    },
    "zero_optimization": {
        "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True}, "overlap_comm": True, "contiguous_gradients": True,
        "sub_group_size": 1e9, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
    },
}  # fmt: skip

Case = tuple[Any, list[str], dict[str, Any]]
#: name -> (file, options, what must come out: the run's options, which have one dot, and DeepSpeed's keys)
GOOD: dict[str, Case] = {
    "Hugging Face's ZeRO-2": (
        HF_ZERO_2,
        ["--train.precision=fp16", "--train.global_batch=96", "--optim.learning_rate=3e-5"],
        {
            "train.zero_stage": 2, "zero.offload_optimizer": "cpu", "train.precision": "fp16",
            "optim.schedule": "constant", "optim.learning_rate": 3e-5, "train_batch_size": 96,
            "train_micro_batch_size_per_gpu": 24, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0,
            "zero_optimization.reduce_bucket_size": 200_000_000, "fp16.loss_scale_window": 500,
            "fp16.initial_scale_power": 12, "bf16": None, "optimizer": None, "scheduler": None,
            "steps_per_print": 2000, "zero_force_ds_cpu_optimizer": False,
        },
    ),
    "Hugging Face's ZeRO-3": (
        HF_ZERO_3,
        ["--train.precision=bf16", "--train.steps=500"],
        {
            "train.zero_stage": 3, "zero.offload_parameters": "cpu", "zero.offload_optimizer": "cpu",
            "optim.schedule": "linear", "train.steps": 500, "bf16.enabled": True, "fp16": None,
            "zero_optimization.stage3_prefetch_bucket_size": 10_000_000,
            "zero_optimization.stage3_max_reuse_distance": 10**9, "zero_optimization.sub_group_size": 10**9,
        },
    ),
    "Hugging Face's file at its defaults": (
        HF_ZERO_2, [], {"train.precision": "fp32", "fp16": None, "bf16": None, "train_batch_size": 64},
    ),
    "empty": ({}, [], {"train.zero_stage": 2, "train_batch_size": 64}),
    "all batch sizes": (
        {"train_batch_size": 48, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 3},
        [],
        {"train.global_batch": 48, "train.micro_batch": 8, "gradient_accumulation_steps": 3},
    ),
    "batch from micro-batch and accumulation": (
        {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 5}, [], {"train.global_batch": 80},
    ),
    "micro-batch from batch and accumulation": (
        {"train_batch_size": 48, "gradient_accumulation_steps": 3}, [], {"train.micro_batch": 8},
    ),
    "accumulation under the run's own batch": (
        {"gradient_accumulation_steps": 4}, ["--train.global_batch=32"], {"train.micro_batch": 4},
    ),
    "the same value on both sides": (
        {"zero_optimization": {"stage": 1}, "train_batch_size": 32},
        ["--train.zero_stage=1", "--train.global_batch=32"],
        {"train.zero_stage": 1, "train.global_batch": 32},
    ),
    "an option given as null": ({"train_micro_batch_size_per_gpu": 4}, ["--train.micro_batch=null"],
                                {"train.micro_batch": 4}),
    "optimizer and cosine": (
        {
            "optimizer": {"type": "FusedAdam", "params": {"lr": 2e-4, "betas": [0.9, 0.98], "weight_decay": 0.1}},
            "scheduler": {"type": "WarmupCosineLR", "params": {
                "total_num_steps": 300, "warmup_num_steps": 30, "cos_min_ratio": 0.1, "warmup_type": "linear"}},
        },
        [],
        {"optim.name": "adamw", "optim.learning_rate": 2e-4, "optim.betas": (0.9, 0.98), "optim.weight_decay": 0.1,
         "optim.schedule": "cosine", "optim.warmup": 30, "optim.min_ratio": 0.1, "train.steps": 300},
    ),
    "warm-up of the same length as a share": (
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 200, "warmup_num_steps": 20}}},
        ["--optim.warmup=0.1"],
        {"optim.warmup": 0.1, "train.steps": 200},
    ),
    "lamb": ({"optimizer": {"type": "Lamb", "params": {"max_coeff": 5.0}}}, [],
             {"optim.name": "lamb", "optim.max_trust_ratio": 5.0}),
    "no clipping": ({"gradient_clipping": 0}, [], {"optim.max_grad_norm": 0, "gradient_clipping": 0}),
    "bf16 as it was called": ({"bfloat16": {"enabled": True}}, [], {"train.precision": "bf16", "bf16.enabled": True}),
    "both precisions off": ({"bf16": {"enabled": False}, "fp16": {"enabled": False}}, [], {"train.precision": "fp32"}),
    "no fp16 under bf16": ({"fp16": {"enabled": False}}, ["--train.precision=bf16"], {"bf16.enabled": True}),
    "cpu_offload": (
        {"zero_optimization": {"stage": 2, "cpu_offload": True, "cpu_offload_use_pin_memory": False}},
        [],
        {"zero.offload_optimizer": "cpu", "zero_optimization.offload_optimizer.pin_memory": False,
         "zero_optimization.cpu_offload": None},
    ),
    "ZeRO as true": ({"zero_optimization": True}, [], {"train.zero_stage": 1}),
    "fp16 weights on save": (
        {"zero_optimization": {"stage": 3, "stage3_gather_fp16_weights_on_model_save": True}}, [],
        {"zero_optimization.stage3_gather_16bit_weights_on_model_save": True},
    ),
    "ZeRO-3's keys at ZeRO-2": (
        {"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 5}}, [],
        {"zero_optimization.stage3_max_live_parameters": None},
    ),
    "monitors": (
        {"tensorboard": {"enabled": False, "output_path": "logs"}, "csv_monitor": {"enabled": True},
         "wandb": {"enabled": True, "project": "bert"}},
        [],
        {"monitor.tensorboard": False, "monitor.csv": True, "monitor.wandb_project": "bert", "tensorboard": None},
    ),
    "recomputation": (
        {"activation_checkpointing": {"number_checkpoints": 4}}, ["--model.size=mini"],
        {"model.activation_checkpointing": True, "activation_checkpointing.number_checkpoints": 4},
    ),
    "what only DeepSpeed knows": (
        {"communication_data_type": "fp32", "prescale_gradients": True, "gradient_predivide_factor": 2.0,
         "comms_logger": {"enabled": True}, "zero_allow_untested_optimizer": True},
        [],
        {"communication_data_type": "fp32", "gradient_predivide_factor": 2, "comms_logger.enabled": True},
    ),
    "removed feature switched off": ({"autotuning": {"enabled": False}}, [], {"autotuning": None}),
}  # fmt: skip

OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
#: name -> (file or its text, options, what the line says, in this order)
BAD: dict[str, tuple[Any, list[str], list[str]]] = {
    "no JSON": ('{"a": 1,}', [], ["ds.json is not JSON", "correct it"]),
    "no object": ("[1]", [], ["ds.json holds list", "not an object"]),
    "a key twice": ('{"bf16": {"enabled": true, "enabled": false}}', [], ["enabled is there twice"]),
    "unknown key": ({"train_batchsize": 8}, [], ["train_batchsize is no key", "did you mean train_batch_size?"]),
    "unknown ZeRO key": (
        {"zero_optimization": {"reduce_bucketsize": 5}}, [],
        ["zero_optimization.reduce_bucketsize is no key of DeepSpeed", "did you mean reduce_bucket_size?"],
    ),
    "unknown aio key": ({"aio": {"block": 5}}, [], ["aio.block is no key", "did you mean block_size?"]),
    "nebula": ({"nebula": {"enabled": True}}, [], ["nebula was removed", "delete it"]),
    "compression": ({"compression_training": {}}, [], ["compression_training was removed", "delete it"]),
    "amp": ({"amp": {"enabled": "auto"}}, [], ["amp was removed", "train.precision"]),
    "elasticity": ({"elasticity": {"enabled": True}}, [], ["elasticity was removed", "train.global_batch"]),
    "curriculum": ({"curriculum_learning": {}}, [], ["curriculum_learning was removed", "data.sequence_length"]),
    "sparse attention": ({"sparse_attention": {"mode": "fixed"}}, [], ["sparse_attention was removed"]),
    "MiCS": ({"zero_optimization": {"mics_shard_size": 2}}, [], ["mics_shard_size was removed"]),
    "autotuning": ({"autotuning": {"enabled": True}}, [], ["autotuning can't be used", "train.micro_batch auto"]),
    "round robin": (
        {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, [],
        ["round_robin_gradients can't be used", "set false"],
    ),
    "cpu_offload twice": (
        {"zero_optimization": {**OFFLOAD, "cpu_offload": True}}, [],
        ["cpu_offload is the old name of zero_optimization.offload_optimizer", "delete cpu_offload"],
    ),
    "two precisions": (
        {"bf16": {"enabled": True}, "fp16": {"enabled": True}}, [], ["bf16.enabled and fp16.enabled are both true"],
    ),
    "stage against an option": (
        {"zero_optimization": {"stage": 3}}, ["--train.zero_stage=2"],
        ["zero_optimization.stage is 3", "train.zero_stage is given as 2", '"auto"'],
    ),
    "batch against an option": (
        {"train_batch_size": 32}, ["--train.global_batch=64"],
        ["train_batch_size is 32", "train.global_batch is given as 64"],
    ),
    "precision against an option": (
        {"bf16": {"enabled": True}}, ["--train.precision=fp32"],
        ["bf16.enabled is True", "train.precision is given as 'fp32'"],
    ),
    "no bf16 against an option": (
        {"bf16": {"enabled": False}}, ["--train.precision=bf16"],
        ["bf16.enabled is False", "train.precision is given as 'bf16'"],
    ),
    "rate against an option": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, ["--optim.learning_rate=1e-4"],
        ["optimizer.params.lr is 0.001", "optim.learning_rate is given as 0.0001"],
    ),
    "offload against an option": (
        {"zero_optimization": OFFLOAD}, ["--zero.offload_optimizer=none"],
        ["offload_optimizer.device is 'cpu'", "zero.offload_optimizer is given as 'none'"],
    ),
    "optimizer against an option": (
        {"optimizer": {"type": "Lamb"}}, ["--optim.name=adamw"],
        ["optimizer.type is 'Lamb'", "optim.name is given as 'adamw'"],
    ),
    "steps against an option": (
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 100}}}, ["--train.steps=50"],
        ["total_num_steps is 100", "train.steps is given as 50"],
    ),
    "steps against epochs": (
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 100}}}, ["--train.epochs=1"],
        ["total_num_steps is 100", "train.epochs is given as 1.0"],
    ),
    "warm-up against an option": (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}},
        ["--optim.warmup=0.1", "--train.steps=100"],
        ["warmup_num_steps is 9", "optim.warmup is given as 0.1"],
    ),
    "two rates": (
        {"optimizer": {"params": {"lr": 1e-3}}, "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 2e-3}}},
        [],
        ["scheduler.params.warmup_max_lr is 0.002", "optimizer.params.lr is 0.001", "keep one"],
    ),
    "batch identity in the file": (
        {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2}, [],
        ["gradient_accumulation_steps is 2", "train_batch_size 64 is not micro-batch 8 x accumulation 2 x 2 rank(s)"],
    ),
    "batch identity with an option": (
        {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2}, ["--train.global_batch=64"],
        ["train.global_batch 64 is not micro-batch 8 x accumulation 2 x 2 rank(s) = 32"],
    ),
    "batch that doesn't divide": (
        {"train_batch_size": 30, "train_micro_batch_size_per_gpu": 4}, [],
        ["train_micro_batch_size_per_gpu is 4", "train_batch_size 30 is no multiple of 4 x 2 rank(s)"],
    ),
    "accumulation that doesn't divide": (
        {"train_batch_size": 32, "gradient_accumulation_steps": 3}, [],
        ["gradient_accumulation_steps is 3", "train_batch_size 32 is no multiple of 3 x 2 rank(s)"],
    ),
    "1-bit Adam": ({"optimizer": {"type": "OneBitAdam"}}, [], ["optimizer.type is 'OneBitAdam'", "AdamW or Lamb"]),
    "Lion": ({"optimizer": {"type": "Lion"}}, [], ["optimizer.type is 'Lion'", "AdamW or Lamb"]),
    "unknown parameter of the optimizer": (
        {"optimizer": {"type": "AdamW", "params": {"weightdecay": 0.1}}}, [],
        ["optimizer.params.weightdecay is unknown", "did you mean weight_decay?"],
    ),
    "norm among the optimizer's parameters": (
        {"optimizer": {"params": {"max_grad_norm": 1.0}}}, [], ["max_grad_norm doesn't clip", "gradient_clipping"],
    ),
    "L2 regularisation": (
        {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, [],
        ["adam_w_mode is False and can only be True", "decoupled"],
    ),
    "unknown schedule": ({"scheduler": {"type": "OneCycle"}}, [], ["scheduler.type is 'OneCycle'", "WarmupDecayLR"]),
    "logarithmic warm-up": (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "log"}}}, [],
        ["warmup_type is 'log' and can only be 'linear'"],
    ),
    "auto without a value": ({"communication_data_type": "auto"}, [], ["communication_data_type is 'auto'", "delete"]),
    "auto in ZeRO without a value": (
        {"zero_optimization": {"sub_group_size": "auto"}}, [], ["sub_group_size is 'auto'", "nothing gives it a value"],
    ),
    "stage in quotes": (
        {"zero_optimization": {"stage": "2"}}, [], ["zero_optimization.stage is '2'", "give one of 0, 1, 2, 3"],
    ),
    "stage that is none": ({"zero_optimization": {"stage": 4}}, [], ["stage is 4", "give one of 0, 1, 2, 3"]),
    "stage as a truth value": ({"zero_optimization": {"stage": True}}, [], ["stage is True", "give one of 0, 1, 2, 3"]),
    "negative batch": ({"train_batch_size": -8}, [], ["train_batch_size is -8", "at least 1"]),
    "batch in quotes": ({"train_batch_size": "32"}, [], ["train_batch_size is '32'", "without quotes"]),
    "negative clipping": ({"gradient_clipping": -1}, [], ["gradient_clipping is -1", "at least 0"]),
    "infinite clipping": ('{"gradient_clipping": Infinity}', [], ["gradient_clipping is inf", "at least 0"]),
    "one beta": ({"optimizer": {"params": {"betas": [0.9]}}}, [], ["betas is [0.9]", "a list of two numbers"]),
    "betas outside of [0, 1)": (
        {"optimizer": {"params": {"betas": [0.9, 1.5]}}}, [],
        ["optim.betas: (0.9, 1.5)", "optim.betas comes from optimizer.params.betas in"],
    ),
    "bucket in quotes": (
        {"zero_optimization": {"reduce_bucket_size": "5e8"}}, [],
        ["reduce_bucket_size is '5e8'", "a whole number, without quotes"],
    ),
    "negative bucket": (
        {"zero_optimization": {"reduce_bucket_size": -5}}, [],
        ["zero_optimization.reduce_bucket_size", "-5 is refused by DeepSpeed"],
    ),
    "overlap as a number": ({"zero_optimization": {"overlap_comm": 1}}, [], ["overlap_comm is 1", "true or false"]),
    "window of the loss scale": (
        {"fp16": {"enabled": True, "loss_scale_window": 0}}, [],
        ["fp16 is refused by DeepSpeed", "loss_scale_window must be > 0"],
    ),
    "section that is none": ({"zero_optimization": 2}, [], ["zero_optimization is 2", "give an object"]),
    "offload that is none": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": True}}, [], ["offload_optimizer is True", "object"],
    ),
    "place that is none": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}}, [],
        ["offload_optimizer.device is 'gpu'", "'none', 'cpu', 'nvme'"],
    ),
    "offload of nothing sharded": (
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, [],
        ["zero.offload_optimizer: 'cpu'", "train.zero_stage 0", "from zero_optimization.offload_optimizer.device"],
    ),
    "parameters offloaded at stage 2": (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, [],
        ["zero.offload_parameters: 'cpu'", "choose stage 3", "zero_optimization.offload_param.device"],
    ),
    "NVMe without a folder": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, [],
        ["zero.nvme_path: None", "give a folder"],
    ),
    "NVMe on no folder": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/dev/null/swap"}}}, [],
        ["zero.nvme_path: /dev/null/swap can't be used", "give a folder"],
    ),
    "parameters on NVMe": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}}, [],
        ["zero.offload_parameters: 'nvme'", "choose cpu"],
    ),
    "partial offload": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}}, [],
        ["ratio is 0.3 and can only be 1"],
    ),
    "DeepSpeed's CPU optimizer": (
        {"zero_force_ds_cpu_optimizer": True}, [], ["zero_force_ds_cpu_optimizer is True and can only be False"],
    ),
    "summed gradients": ({"gradient_allreduce_op": "sum"}, [], ["gradient_allreduce_op is 'sum'", "'mean'"]),
    "bf16 masters": (
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, [],
        ["bf16_master_weights_and_grads can't be used"],
    ),
    "activations on the CPU": (
        {"activation_checkpointing": {"cpu_checkpointing": True}}, [], ["cpu_checkpointing is True", "False"],
    ),
    "recomputation against an option": (
        {"activation_checkpointing": {"number_checkpoints": 2}}, ["--model.activation_checkpointing=false"],
        ["number_checkpoints is 2", "model.activation_checkpointing is given as False"],
    ),
}  # fmt: skip
