//! Rules that take more than one key, and the keys that must be given.

use super::faults::{Fault, FaultKind, shown};
use super::source::Places;
use super::{
    BestMetric, DType, FinetuningType, InitLoraWeights, Mixing, Modules, ObjectiveConfig, ObjectiveName, Optim,
    PeftType, Quantization, RewardName, RunConfig, TaskType, Weights,
};
use crate::objective::DpoLoss;
use crate::schedule::ScheduleKind;
use toml::{Table, Value};

/// Adds what is wrong with a configuration whose values are each allowed. `tree` is what was written, without the values
/// that were reported already.
pub(crate) fn check(config: &RunConfig, tree: &Table, places: &Places, faults: &mut Vec<Fault>) {
    let mut rules = Rules { tree, places, faults };
    rules.required(
        config.output_dir.as_os_str().is_empty(),
        "output_dir",
        "give --output DIR, or output_dir = \"runs/NAME\"",
    );
    rules.required(config.model.path.is_empty(), "model.path", "give --model DIR, or path = \"DIR\" under [model]");
    rules.required(config.data.train.is_empty(), "data.train", "give --data FILE, or train = \"FILE\" under [data]");
    let data = &config.data;
    for (list, name) in [(&data.train, "data.train"), (&data.eval, "data.eval"), (&data.replay, "data.replay")] {
        for (i, source) in list.iter().enumerate() {
            let empty = source.path.as_os_str().is_empty();
            rules.required(empty, &format!("{name}[{i}].path"), "give the path of the file");
        }
    }
    kept(config, &mut rules);
    lengths(config, &mut rules);
    replay(config, &mut rules);
    schedule_options(config, &mut rules);
    best(config, &mut rules);
    answering(config, &mut rules);
    targets(config, &mut rules);
    methods(config, &mut rules);
    objective(config, &mut rules);
    pipeline(config, &mut rules);
    if config.data.eval_split > 0.0 {
        rules.exclude("data.eval_split", "data.eval", "keep the one that says where evaluation data comes from");
    }
    if config.data.group_by_length {
        let (packed, fixed) = (config.data.packing, !config.data.shuffle);
        if packed {
            rules.exclude("data.group_by_length", "data.packing", "packed rows are of one length; keep one of them");
        }
        if fixed {
            rules.exclude(
                "data.group_by_length",
                "data.shuffle",
                "grouping makes an order of its own; keep one of them",
            );
        }
    }
    if config.data.mixing == Mixing::Sequential {
        if config.data.group_by_length {
            let remedy = "grouping puts examples of all datasets together; keep one of them";
            rules.exclude("data.group_by_length", "data.mixing", remedy);
        }
        if config.lora.task_type == TaskType::SeqCls && !config.objective.compares() {
            let remedy = "the texts of a classifier are not mixed; remove it";
            rules.contradiction("data.mixing", "lora.task_type = \"SEQ_CLS\"".into(), remedy);
        }
    }
    if config.data.train_on_last_turn_only && config.data.train_on_prompt {
        let remedy = "one trains less than the answers, the other more; keep one of them";
        rules.exclude("data.train_on_last_turn_only", "data.train_on_prompt", remedy);
    }
    if config.train.finetuning_type == FinetuningType::Full {
        rules.exclude(
            "lora.init_adapter",
            "train.finetuning_type",
            "full training has no adapter; remove init_adapter",
        );
        for key in ["model.quantization", "model.weights"] {
            rules.exclude(key, "train.finetuning_type", "full training changes every weight; it needs them converted");
        }
        if config.train.optim == Optim::AdamW8 && matches!(config.model.dtype, DType::BFloat16 | DType::Float16) {
            let remedy = "moments in 8 bits are made for weights that are trained in float32; set dtype = \"float32\"";
            rules.exclude("train.optim", "model.dtype", remedy);
        }
        rules.exclude(
            "train.loraplus_lr_ratio",
            "train.finetuning_type",
            "full training has no A and B; remove loraplus_lr_ratio",
        );
    }
}

/// What is computed again, and in which order.
fn kept(config: &RunConfig, rules: &mut Rules<'_>) {
    let train = &config.train;
    if train.accumulate_by_block {
        let key = "train.accumulate_by_block";
        let with = || format!("train.gradient_checkpointing = \"{}\"", train.gradient_checkpointing.name());
        let remedy = "on the way back each block is computed again; set gradient_checkpointing = \"full\"";
        rules.contradiction_if(!train.gradient_checkpointing.recomputes(), key, with(), remedy);
        let with = || format!("objective.name = \"{}\"", config.objective.name.name());
        let remedy = "its micro-batches are judged one after the other; remove accumulate_by_block";
        rules.contradiction_if(config.objective.name != ObjectiveName::Sft, key, with(), remedy);
        let with = || format!("train.pipeline_stages = {}", train.pipeline_stages);
        let remedy = "stages take turns with micro-batches; remove accumulate_by_block";
        rules.contradiction_if(train.pipeline_stages > 1, key, with(), remedy);
    }
    let remedy = "it computes all of them again; remove one of the two";
    let with = || format!("train.gradient_checkpointing = \"{}\"", train.gradient_checkpointing.name());
    let all = train.gradient_checkpointing.recomputes() && train.recompute_layers > 0;
    rules.contradiction_if(all, "train.recompute_layers", with(), remedy);
    if config.model.weights == Weights::Host {
        let key = "model.weights";
        let remedy =
            "a block is on the device while it is computed only; set gradient_checkpointing = \"full\" or \"offload\"";
        rules.contradiction_if(!train.gradient_checkpointing.recomputes(), key, with(), remedy);
        let with = || format!("model.quantization = \"{}\"", config.model.quantization.name());
        let remedy = "a packed base is small enough for the device; remove weights";
        rules.contradiction_if(config.model.quantization != Quantization::None, key, with(), remedy);
        let full = train.finetuning_type == FinetuningType::Full;
        let remedy = "weights that are trained stay on the device; remove weights";
        rules.contradiction_if(full, key, "train.finetuning_type = \"full\"".into(), remedy);
    }
}

fn lengths(config: &RunConfig, rules: &mut Rules<'_>) {
    let train = &config.train;
    rules.exclude("train.max_steps", "train.num_train_epochs", "keep one of them");
    rules.exclude("train.warmup_steps", "train.warmup_ratio", "keep one of them");
    if let (Some(warmup), Some(total)) = (train.warmup_steps, train.max_steps)
        && warmup > total
    {
        rules.exclude("train.warmup_steps", "train.max_steps", "the warm-up must end within the run");
    }
    if train.lr_scheduler_type == ScheduleKind::Constant {
        let remedy = "a constant schedule has no warm-up; use lr_scheduler_type = \"constant_with_warmup\"";
        if train.warmup_steps.is_some_and(|steps| steps > 0) {
            rules.exclude("train.warmup_steps", "train.lr_scheduler_type", remedy);
        }
        if train.warmup_ratio.is_some_and(|ratio| ratio > 0.0) {
            rules.exclude("train.warmup_ratio", "train.lr_scheduler_type", remedy);
        }
    }
}

/// An old set and its share belong together, and both to a set whose rows are batched in any order.
fn replay(config: &RunConfig, rules: &mut Rules<'_>) {
    let data = &config.data;
    let remedy = "data.replay_share is a share of an old set: say where it is, or remove replay_share";
    rules.required(data.replay_share > 0.0 && data.replay.is_empty(), "data.replay", remedy);
    if data.replay.is_empty() {
        return;
    }
    let remedy =
        "data.replay is given: say which share of the rows comes from it, as replay_share = 0.1, or remove replay";
    rules.required(data.replay_share == 0.0, "data.replay_share", remedy);
    let sequential = data.mixing == Mixing::Sequential;
    let remedy =
        "old examples belong to none of the stages; put the old set into train with a weight, or choose another mixing";
    rules.contradiction_if(sequential, "data.replay", "data.mixing = \"sequential\"".into(), remedy);
    let classifier = config.lora.task_type == TaskType::SeqCls && !config.objective.compares();
    let remedy = "the texts of a classifier are not mixed; put the old set into train";
    rules.contradiction_if(classifier, "data.replay", "lora.task_type = \"SEQ_CLS\"".into(), remedy);
}

/// What compares evaluations needs some.
fn best(config: &RunConfig, rules: &mut Rules<'_>) {
    let train = &config.train;
    if !train.load_best_model_at_end && train.early_stopping_patience.is_none() {
        return;
    }
    let (metric, classifier) = (train.metric_for_best_model, config.lora.task_type == TaskType::SeqCls);
    let has_it = match metric {
        BestMetric::Loss => true,
        BestMetric::Accuracy => config.objective.name != ObjectiveName::Kto,
        BestMetric::MacroF1 => classifier && !config.objective.compares(),
        BestMetric::RewardMargin => config.objective.compares(),
        BestMetric::Bleu | BestMetric::Chrf | BestMetric::RougeL | BestMetric::ExactMatch => true,
    };
    if metric.of_answers() && !train.predict_with_generate {
        let remedy = "no answers are written: set predict_with_generate = true, or choose another, as \"eval_loss\"";
        rules.contradiction("train.metric_for_best_model", "train.predict_with_generate = false".into(), remedy);
    }
    let with = format!("objective.name = \"{}\" and its evaluations", config.objective.name.name());
    let remedy = "they have no such figure; choose another, as \"eval_loss\"";
    rules.contradiction_if(!has_it, "train.metric_for_best_model", with, remedy);
    let none_held_out = config.data.eval.is_empty() && config.data.eval_split == 0.0;
    let remedy = "the best evaluation is looked for: give data.eval, or a part of the data by data.eval_split";
    rules.required(none_held_out, "data.eval_split", remedy);
    let remedy = "the best evaluation is looked for: say every how many optimizer steps there is one";
    rules.required(train.eval_steps == 0, "train.eval_steps", remedy);
}

/// What answers prompts needs some, apart from their answers.
fn answering(config: &RunConfig, rules: &mut Rules<'_>) {
    let key = "train.predict_with_generate";
    if !config.train.predict_with_generate {
        return;
    }
    let classifier = config.lora.task_type == TaskType::SeqCls;
    let with = format!("lora.task_type = \"{}\"", config.lora.task_type.name());
    rules.contradiction_if(classifier, key, with, "a classifier writes no answers; remove it");
    let with = format!("objective.name = \"{}\"", config.objective.name.name());
    let remedy = "its evaluation compares answers that are there; remove it";
    rules.contradiction_if(config.objective.compares() && !classifier, key, with, remedy);
    let remedy = "where prompts are trained they do not end where answers begin; remove one of them";
    rules.contradiction_if(config.data.train_on_prompt, key, "data.train_on_prompt = true".into(), remedy);
    let none_held_out = config.data.eval.is_empty() && config.data.eval_split == 0.0;
    let remedy = "prompts of the evaluation are answered: give data.eval, or a part of the data by data.eval_split";
    rules.required(none_held_out, "data.eval_split", remedy);
}

/// Options of the schedule that say nothing to it, or too much.
fn schedule_options(config: &RunConfig, rules: &mut Rules<'_>) {
    let (train, kind) = (&config.train, config.train.lr_scheduler_type);
    let number = |key: &str| {
        let value = train.lr_scheduler_kwargs.get(key)?;
        value.as_float().or_else(|| value.as_integer().map(|i| i as f64))
    };
    let given = train.lr_scheduler_kwargs.keys();
    if given.into_iter().any(|key| !kind.options().contains(&key.as_str())) {
        let own = match kind.options() {
            [] => "none".to_string(),
            some => some.join(" and "),
        };
        let with = format!("train.lr_scheduler_type = \"{}\", whose options are: {own}", kind.name());
        rules.contradiction("train.lr_scheduler_kwargs", with, "remove the others");
    }
    if number("min_lr").is_some() && number("min_lr_rate").is_some() {
        let remedy = "one is the other times the learning rate; keep one of them";
        rules.contradiction("train.lr_scheduler_kwargs", "min_lr and min_lr_rate".into(), remedy);
    }
    let highest =
        [("min_lr", train.learning_rate), ("lr_end", train.learning_rate), ("min_lr_rate", 1.0), ("min_lr_ratio", 1.0)];
    for (key, most) in highest {
        if number(key).is_some_and(|least| least > most) {
            let remedy = "the learning rate falls; its least must not be above the highest";
            rules.contradiction("train.lr_scheduler_kwargs", format!("{key} above {most}"), remedy);
        }
    }
}

fn targets(config: &RunConfig, rules: &mut Rules<'_>) {
    let lora = &config.lora;
    if matches!(&lora.target_modules, Modules::Pattern(_)) && !lora.target_modules.is_all_linear() {
        let remedy = "a regular expression picks the layers itself; use a list of names or drop this key";
        rules.exclude("lora.layers_to_transform", "lora.target_modules", remedy);
        rules.exclude("lora.layers_pattern", "lora.target_modules", remedy);
    }
    if lora.layers_pattern.is_some() {
        let missing = lora.layers_to_transform.is_none();
        rules.required(missing, "lora.layers_to_transform", "layers_pattern needs the indices of the layers");
    }
    let empty_list = matches!(&lora.target_modules, Modules::Names(names) if names.is_empty());
    let other_targets = lora.trainable_token_indices.is_some() || !lora.target_parameters.is_empty();
    if config.train.finetuning_type == FinetuningType::Lora && empty_list && !other_targets {
        rules.required(true, "lora.target_modules", "name the modules, or use \"all-linear\"");
    }
}

/// Keys of one type of adapters beside another type.
fn methods(config: &RunConfig, rules: &mut Rules<'_>) {
    let lora = &config.lora;
    if config.train.finetuning_type == FinetuningType::Full || lora.init_adapter.is_some() {
        return;
    }
    let vera = ["projection_prng_key", "save_projection", "vera_dropout", "d_initial"];
    let adalora =
        ["target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"];
    let other: [(&[&str], PeftType, &'static str); 2] = [
        (&vera, PeftType::Vera, "only VeRA has this key; set peft_type = \"VERA\", or remove it"),
        (&adalora, PeftType::AdaLora, "only AdaLoRA has this key; set peft_type = \"ADALORA\", or remove it"),
    ];
    for (keys, owner, remedy) in other {
        if lora.peft_type != owner {
            keys.iter().for_each(|key| rules.beside(&format!("lora.{key}"), lora.peft_type, remedy));
        }
    }
    if lora.loftq_iter.is_some() && lora.init_lora_weights != InitLoraWeights::LoftQ {
        let remedy = "only LoftQ has this key; set init_lora_weights = \"loftq\", or remove it";
        rules.contradiction("lora.loftq_iter", "another lora.init_lora_weights".into(), remedy);
    }
    if lora.peft_type == PeftType::Vera && lora.lora_dropout > 0.0 {
        rules.beside("lora.lora_dropout", lora.peft_type, "VeRA's key is vera_dropout");
    }
    if lora.peft_type == PeftType::AdaLora && lora.r != super::LoraConfig::default().r {
        rules.beside("lora.r", lora.peft_type, "AdaLoRA has init_r for the start and target_r for the end");
    }
}

/// Keys of one objective beside another, and what does not go with answers that are compared.
fn objective(config: &RunConfig, rules: &mut Rules<'_>) {
    use ObjectiveName::{Dpo, Grpo, Kto, Orpo, Reward, SimPo};
    let own = &config.objective;
    let owners: [(&str, &[ObjectiveName], &'static str); 9] = [
        ("loss_type", &[Dpo, Kto], "only dpo and kto have losses to choose from; remove it"),
        ("beta", &[Dpo, Kto, Orpo, SimPo, Grpo], "only dpo, kto, orpo, simpo and grpo have this key; remove it"),
        ("label_smoothing", &[Dpo], "only dpo has this key; remove it"),
        ("rpo_alpha", &[Dpo], "only dpo has this key; remove it"),
        ("simpo_gamma", &[SimPo], "only simpo has this key; remove it"),
        ("desirable_weight", &[Kto], "only kto has this key; remove it"),
        ("undesirable_weight", &[Kto], "only kto has this key; remove it"),
        ("center_rewards_coefficient", &[Reward], "only a reward model has this key; remove it"),
        ("reference", &[Dpo, Kto, Grpo], "only dpo, kto and grpo have a reference; remove it"),
    ];
    let of_grpo = GRPO_KEYS.map(|key| (key, &[Grpo][..], "only grpo has this key; remove it"));
    let with = || format!("objective.name = \"{}\"", own.name.name());
    // A resolved configuration has the keys of all, at their defaults.
    let usual = Table::try_from(ObjectiveConfig::default()).unwrap_or_default();
    for (key, names, remedy) in owners.into_iter().chain(of_grpo) {
        let path = format!("objective.{key}");
        if !names.contains(&own.name) && get(rules.tree, &path) != usual.get(key) {
            rules.contradiction(&path, with(), remedy);
        }
    }
    if own.name == Kto && !matches!(own.loss_type, DpoLoss::Sigmoid | DpoLoss::ApoZero) {
        rules.contradiction("objective.loss_type", with(), "kto has the losses \"sigmoid\" and \"apo_zero\"");
    }
    if own.label_smoothing > 0.0 && !matches!(own.loss_type, DpoLoss::Sigmoid | DpoLoss::Robust) {
        let loss = format!("objective.loss_type = \"{}\"", own.loss_type.name());
        rules.contradiction(
            "objective.label_smoothing",
            loss,
            "only sigmoid and robust have label smoothing; remove it",
        );
    }
    if own.label_smoothing >= 0.5 {
        let remedy = "at a half and above, the worse ones would be preferred; set a share below 0.5";
        rules.contradiction("objective.label_smoothing", "preferring the better answers".into(), remedy);
    }
    if own.beta == Some(0.0) && !own.samples() {
        let remedy = "it must be above 0; only grpo can do without";
        rules.contradiction("objective.beta", with(), remedy);
    }
    if own.samples() {
        sampling(config, rules);
    }
    let classifier = config.lora.task_type == TaskType::SeqCls;
    if own.name == Reward && !classifier {
        rules.required(true, "lora.task_type", "a reward model scores texts; set lora.task_type = \"SEQ_CLS\"");
    }
    if own.compares() {
        if classifier && own.name != Reward {
            rules.contradiction(
                "objective.name",
                "lora.task_type = \"SEQ_CLS\"".into(),
                "a classifier has no answers; remove one of them",
            );
        }
        let remedy = "answers are compared whole, so prompts are never trained; remove it";
        rules.contradiction_if(config.data.train_on_prompt, "data.train_on_prompt", with(), remedy);
        let remedy = "a batch holds whole pairs or answers, without padding in any case; remove it";
        rules.contradiction_if(config.data.packing, "data.packing", with(), remedy);
        let remedy = "the parts of a divided answer cannot be compared; use \"right\" or \"drop\"";
        let divides = config.data.truncation == super::Truncation::Split;
        rules.contradiction_if(divides, "data.truncation", with(), remedy);
        let remedy = "this objective learns from the worse answers, too; remove it";
        rules.contradiction("data.preference", with(), remedy);
    }
}

/// What a model that is divided among processes cannot do.
fn pipeline(config: &RunConfig, rules: &mut Rules<'_>) {
    let (train, lora) = (&config.train, &config.lora);
    if train.pipeline_stages == 1 {
        let remedy = "nothing goes from stage to stage; set pipeline_stages, or remove it";
        let apart = train.pipeline_dtype != super::PipelineDType::Float32;
        rules.contradiction_if(apart, "train.pipeline_dtype", "train.pipeline_stages = 1".into(), remedy);
        return;
    }
    let with = || format!("train.pipeline_stages = {}", train.pipeline_stages);
    let other_method = lora.init_adapter.is_none() && lora.peft_type != PeftType::Lora;
    for (is, key, remedy) in [
        (
            train.finetuning_type == FinetuningType::Full,
            "train.finetuning_type",
            "only adapters are trained in stages; use \"lora\"",
        ),
        (
            config.objective.name != ObjectiveName::Sft,
            "objective.name",
            "only supervised fine-tuning goes in stages; use \"sft\"",
        ),
        (lora.task_type == TaskType::SeqCls, "lora.task_type", "classifiers are not divided; remove it"),
        (other_method, "lora.peft_type", "only LoRA is trained in stages; use \"LORA\""),
        (!lora.modules_to_save.is_empty(), "lora.modules_to_save", "modules are not trained in full there; remove it"),
        (
            lora.trainable_token_indices.is_some(),
            "lora.trainable_token_indices",
            "rows of tokens are not trained there; remove it",
        ),
        (
            !lora.target_parameters.is_empty(),
            "lora.target_parameters",
            "stacked experts are not trained there; remove it",
        ),
        (train.predict_with_generate, "train.predict_with_generate", "no stage can write an answer alone; remove it"),
        (!train.sample_prompts.is_empty(), "train.sample_prompts", "no stage can write an answer alone; remove it"),
    ] {
        rules.contradiction_if(is, key, with(), remedy);
    }
    // A resolved configuration has the usual number, and none are asked.
    let asked = train.sample_count > 0 && train.sample_count != super::TrainConfig::default().sample_count;
    rules.contradiction_if(asked, "train.sample_count", with(), "no stage can write an answer alone; remove it");
}

/// Keys that only GRPO has.
const GRPO_KEYS: [&str; 13] = [
    "reward",
    "reward_command",
    "reward_timeout",
    "num_generations",
    "max_completion_length",
    "temperature",
    "top_p",
    "policy_average",
    "scale_rewards",
    "num_iterations",
    "epsilon",
    "epsilon_high",
    "mask_truncated_completions",
];

/// What goes with answers that the model writes, and what does not.
fn sampling(config: &RunConfig, rules: &mut Rules<'_>) {
    let own = &config.objective;
    let with = || format!("objective.name = \"{}\"", own.name.name());
    let commanded = own.reward == Some(RewardName::Command);
    let remedy =
        "an answer must be rewarded: name what does it, as \"exact_match\", or \"command\" with reward_command";
    rules.required(own.reward.is_none(), "objective.reward", remedy);
    let remedy = "the program that rewards answers, as [\"python3\", \"reward.py\"]";
    rules.required(commanded && own.reward_command.is_empty(), "objective.reward_command", remedy);
    if !own.reward_command.is_empty() && own.reward.is_some() && !commanded {
        let remedy = "the program is not asked; set reward = \"command\", or remove it";
        rules.exclude("objective.reward_command", "objective.reward", remedy);
    }
    if own.top_p == 0.0 {
        let remedy = "nothing could be drawn; set a share above 0, or 1 for all";
        rules.contradiction("objective.top_p", "drawing answers".into(), remedy);
    }
    let classifier = config.lora.task_type == TaskType::SeqCls;
    rules.contradiction_if(classifier, "lora.task_type", with(), "a classifier writes no answers; remove it");
    let remedy = "a batch holds whole answers, without padding in any case; remove it";
    rules.contradiction_if(config.data.packing, "data.packing", with(), remedy);
    let remedy = "only what the model writes is trained; remove it";
    rules.contradiction_if(config.data.train_on_prompt, "data.train_on_prompt", with(), remedy);
    let remedy = "the divided prompts would be others; use \"left\" or \"drop\"";
    let divides = config.data.truncation == super::Truncation::Split;
    rules.contradiction_if(divides, "data.truncation", with(), remedy);
    let remedy = "its evaluation answers prompts in any case; remove it";
    rules.contradiction_if(config.train.predict_with_generate, "train.predict_with_generate", with(), remedy);
    let remedy = "noise would make other probabilities than those that answers were drawn with; remove it";
    let noisy = config.train.neftune_noise_alpha > 0.0;
    rules.contradiction_if(noisy, "train.neftune_noise_alpha", with(), remedy);
}

struct Rules<'a> {
    tree: &'a Table,
    places: &'a Places,
    faults: &'a mut Vec<Fault>,
}

impl Rules<'_> {
    /// A key that must be given, unless its value was given and reported already.
    fn required(&mut self, missing: bool, key: &str, remedy: &'static str) {
        let reported = self.faults.iter().any(|fault| fault.key == key || fault.key.starts_with(&format!("{key}[")));
        if missing && !reported {
            self.faults.push(self.places.fault(key, None, FaultKind::Missing { remedy }));
        }
    }

    /// A key that says nothing under this type of adapters.
    fn beside(&mut self, key: &str, peft_type: PeftType, remedy: &'static str) {
        self.contradiction(key, format!("lora.peft_type = \"{}\"", peft_type.name()), remedy);
    }

    fn contradiction(&mut self, key: &str, with: String, remedy: &'static str) {
        if let Some(value) = get(self.tree, key) {
            self.faults.push(self.places.fault(key, Some(value), FaultKind::Contradiction { with, remedy }));
        }
    }

    fn contradiction_if(&mut self, is: bool, key: &str, with: String, remedy: &'static str) {
        if is {
            self.contradiction(key, with, remedy);
        }
    }

    /// Two keys that were both given, or of which the other has a default, and that exclude each other.
    fn exclude(&mut self, key: &str, other: &str, remedy: &'static str) {
        if let (Some(value), Some(with)) = (get(self.tree, key), get(self.tree, other)) {
            let with = format!("{other} = {}", shown(with));
            self.faults.push(self.places.fault(key, Some(value), FaultKind::Contradiction { with, remedy }));
        }
    }
}

/// The value that was written for a dotted key.
fn get<'a>(tree: &'a Table, key: &str) -> Option<&'a Value> {
    match key.split_once('.') {
        Some((section, name)) => tree.get(section)?.get(name),
        None => tree.get(key),
    }
}
