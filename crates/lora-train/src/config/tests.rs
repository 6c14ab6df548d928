use super::*;
use crate::schedule::ScheduleKind;
use proptest::prelude::*;
use std::collections::BTreeSet;

mod faults;
mod steps;

const MINIMAL: &str = "output_dir = \"runs/x\"\n[model]\npath = \"base\"\n[data]\ntrain = \"train.jsonl\"\n";

fn load_text(text: &str, extension: &str, settings: &[&str]) -> Result<RunConfig, ConfigErrors> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(format!("run.{extension}"));
    std::fs::write(&path, text).unwrap();
    let settings: Vec<Override> = settings.iter().map(|s| s.parse().unwrap()).collect();
    RunConfig::load(Some(&path), &settings)
}

fn toml_faults(text: &str, settings: &[&str]) -> String {
    load_text(text, "toml", settings).unwrap_err().to_string()
}

/// A configuration with a value for every key: without `..`, so that a new key must be put here.
fn full() -> RunConfig {
    let source = SourceConfig {
        path: "a.jsonl".into(),
        format: Some("alpaca".into()),
        columns: vec![("prompt".into(), "q".into())],
        tags: vec![("role_tag".into(), "who".into())],
        text_by: TextBy::Paragraph,
        separator: Some("||".into()),
        split: Some("test".into()),
        max_samples: Some(5),
        weight: Some(0.5),
    };
    RunConfig {
        output_dir: "runs/x".into(),
        seed: 7,
        model: ModelConfig {
            path: "base".into(),
            dtype: DType::BFloat16,
            quantization: Quantization::Nf4Double,
            weights: Weights::Stored,
            device: "cuda:1".into(),
            labels: vec!["bad".into(), "good".into()],
            problem_type: Some("single_label_classification".into()),
            kernels: Kernels::Compiled,
            threads: 3,
        },
        lora: LoraConfig {
            r: 16,
            lora_alpha: 32.5,
            lora_dropout: 0.1,
            target_modules: Modules::Names(vec!["q_proj".into(), "v_proj".into()]),
            exclude_modules: Some(Modules::Pattern(".*lm_head".into())),
            bias: Bias::LoraOnly,
            use_rslora: true,
            use_dora: true,
            lora_bias: true,
            init_lora_weights: InitLoraWeights::Principal("pissa_niter_4".into()),
            rank_pattern: vec![("z.q_proj".into(), 4), ("a".into(), 2)],
            alpha_pattern: vec![("z.q_proj".into(), 4.5), ("a".into(), 2.0)],
            layers_to_transform: Some(vec![1, 0]),
            layers_pattern: Some(vec!["layers".into()]),
            modules_to_save: vec!["lm_head".into()],
            trainable_token_indices: Some(Tokens::ByModule([("embed_tokens".to_string(), vec![5, 3])].into())),
            ensure_weight_tying: true,
            target_parameters: vec!["experts.down_proj".into()],
            task_type: TaskType::CausalLm,
            init_adapter: Some("old".into()),
            ..LoraConfig::default()
        },
        objective: ObjectiveConfig::default(),
        data: DataConfig {
            train: vec![source.clone()],
            eval: vec![source.clone()],
            eval_split: 0.0,
            replay: vec![source],
            replay_share: 0.25,
            hub_cache: Some("cache".into()),
            cache: Cache::Always,
            cache_dir: Some("tokens".into()),
            mixing: Mixing::InterleaveUnder,
            dedup: true,
            bad_records: BadRecords::Skip,
            max_bad_share: 0.25,
            preference: Preference::Chosen,
            max_length: 512,
            packing: true,
            truncation: Truncation::Drop,
            template: Some("chat.jinja".into()),
            template_variables: [("enable_thinking".to_string(), toml::Value::Boolean(false))].into_iter().collect(),
            template_date: Some("2026-11-24".into()),
            train_on_prompt: true,
            train_on_last_turn_only: false,
            train_roles: vec!["assistant".into(), "tool".into()],
            max_affected_share: 0.5,
            shuffle: false,
            group_by_length: false,
        },
        watch: WatchConfig { interval: "30s".into(), eval_tolerance: 0.5, replay_share: Some(0.25) },
        train: TrainConfig {
            finetuning_type: FinetuningType::Lora,
            num_train_epochs: Some(1.5),
            max_steps: None,
            max_time: Some("2h30m".into()),
            per_device_train_batch_size: 2,
            per_device_eval_batch_size: 3,
            gradient_accumulation_steps: 4,
            learning_rate: 1e-3,
            loraplus_lr_ratio: Some(16.0),
            loraplus_lr_embedding: 1e-5,
            lr_scheduler_type: ScheduleKind::Cosine,
            optim: Optim::AdamW8,
            neftune_noise_alpha: 5.0,
            warmup_steps: None,
            warmup_ratio: Some(0.03),
            weight_decay: 0.01,
            max_grad_norm: 0.0,
            adam_beta1: 0.8,
            adam_beta2: 0.99,
            adam_epsilon: 1e-6,
            gradient_checkpointing: Checkpointing::Full,
            // Others go with less than all.
            recompute_layers: 0,
            accumulate_by_block: false,
            eval_steps: 10,
            predict_with_generate: false,
            generation_max_new_tokens: 32,
            generation_num_samples: Some(9),
            save_steps: 20,
            save_total_limit: 3,
            ddp_timeout: 60,
            ddp_check_steps: 7,
            // Others go with nothing that is sampled, which this has.
            pipeline_stages: 1,
            pipeline_dtype: PipelineDType::Float32,
            logging_steps: 5,
            lr_scheduler_kwargs: toml::Table::new(),
            sample_prompts: vec!["say it".into()],
            sample_count: 5,
            sample_max_new_tokens: 16,
            load_best_model_at_end: true,
            metric_for_best_model: BestMetric::Accuracy,
            early_stopping_patience: Some(4),
            early_stopping_threshold: 0.01,
        },
    }
}

#[test]
fn a_minimal_configuration_takes_the_defaults() {
    let config = load_text(MINIMAL, "toml", &[]).unwrap();
    let mut expected = RunConfig { output_dir: "runs/x".into(), ..RunConfig::default() };
    expected.model.path = "base".into();
    expected.data.train = vec![SourceConfig { path: "train.jsonl".into(), ..SourceConfig::default() }];
    expected.train.num_train_epochs = Some(3.0);
    assert_eq!(config, expected);
    assert_eq!((config.lora.r, config.lora.lora_alpha, config.train.learning_rate), (8, 16.0, 2e-4));
    assert!(config.lora.target_modules.is_all_linear());
    let settings = ["output_dir=runs/x", "model.path=base", "data.train=train.jsonl"].map(|s| s.parse().unwrap());
    assert_eq!(RunConfig::load(None, &settings).unwrap(), expected);
}

#[test]
fn yaml_reads_into_the_same_configuration() {
    let yaml = r"
output_dir: runs/x
seed: 7
model:
  {path: base, dtype: bfloat16, quantization: nf4-double, weights: stored, device: 'cuda:1', labels: [bad, good],
   problem_type: single_label_classification, kernels: compiled, threads: 3}
lora:
  r: 16
  lora_alpha: 32.5
  lora_dropout: 0.1
  target_modules: [q_proj, v_proj]
  exclude_modules: .*lm_head
  bias: lora_only
  use_rslora: true
  use_dora: true
  lora_bias: true
  init_lora_weights: pissa_niter_4
  rank_pattern: {z.q_proj: 4, a: 2}
  alpha_pattern: {z.q_proj: 4.5, a: 2}
  layers_to_transform: [1, 0]
  layers_pattern: layers
  modules_to_save: lm_head
  trainable_token_indices: {embed_tokens: [5, 3]}
  ensure_weight_tying: true
  target_parameters: experts.down_proj
  task_type: CAUSAL_LM
  init_adapter: old
data:
  train: {path: a.jsonl, format: alpaca, columns: {prompt: q}, tags: {role_tag: who}, text_by: paragraph, separator: '||', split: test, max_samples: 5, weight: 0.5}
  eval: [{path: a.jsonl, format: alpaca, columns: {prompt: q}, tags: {role_tag: who}, text_by: paragraph, separator: '||', split: test, max_samples: 5, weight: 0.5}]
  replay: [{path: a.jsonl, format: alpaca, columns: {prompt: q}, tags: {role_tag: who}, text_by: paragraph, separator: '||', split: test, max_samples: 5, weight: 0.5}]
  replay_share: 0.25
  hub_cache: cache
  cache: always
  cache_dir: tokens
  mixing: interleave_under
  dedup: true
  bad_records: skip
  max_bad_share: 0.25
  preference: chosen
  max_length: 512
  packing: true
  truncation: drop
  template: chat.jinja
  template_variables: {enable_thinking: false}
  template_date: 2026-11-24
  train_on_prompt: true
  train_roles: [assistant, tool]
  max_affected_share: 0.5
  shuffle: false
train:
  num_train_epochs: 1.5
  max_steps: null
  max_time: 2h30m
  per_device_train_batch_size: 2
  per_device_eval_batch_size: 3
  gradient_accumulation_steps: 4
  learning_rate: 1e-3
  loraplus_lr_ratio: 16
  loraplus_lr_embedding: 1e-5
  lr_scheduler_type: cosine
  warmup_ratio: 0.03
  optim: adamw_bnb_8bit
  neftune_noise_alpha: 5
  weight_decay: 0.01
  max_grad_norm: 0
  adam_beta1: 0.8
  adam_beta2: 0.99
  adam_epsilon: 1e-6
  gradient_checkpointing: true
  eval_steps: 10
  generation_max_new_tokens: 32
  generation_num_samples: 9
  save_steps: 20
  save_total_limit: 3
  ddp_timeout: 60
  ddp_check_steps: 7
  logging_steps: 5
  sample_prompts: say it
  sample_count: 5
  sample_max_new_tokens: 16
  load_best_model_at_end: true
  metric_for_best_model: eval_accuracy
  early_stopping_patience: 4
  early_stopping_threshold: 0.01
watch: {interval: 30s, eval_tolerance: 0.5, replay_share: 0.25}
";
    assert_eq!(load_text(yaml, "yaml", &[]).unwrap(), full());
    assert_eq!(load_text(yaml, "YML", &[]).unwrap(), full());
    assert_eq!(load_text(&full().to_toml().unwrap(), "toml", &[]).unwrap(), full());
}

#[test]
fn short_forms_of_the_data() {
    let with = |train: &str| {
        let text = MINIMAL.replace("\"train.jsonl\"", train);
        load_text(&text, "toml", &[]).unwrap().data.train
    };
    let source = |path: &str| SourceConfig { path: path.into(), ..SourceConfig::default() };
    assert_eq!(with("\"a\""), [source("a")]);
    assert_eq!(with("[\"a\", { path = \"b\" }]"), [source("a"), source("b")]);
    assert_eq!(with("{ path = \"b\", max_samples = 3 }"), [SourceConfig { max_samples: Some(3), ..source("b") }]);
    let layers = load_text(&format!("{MINIMAL}[lora]\nlayers_to_transform = 3\n"), "toml", &[]).unwrap();
    assert_eq!(layers.lora.layers_to_transform, Some(vec![3]));
}

#[test]
fn what_cannot_be_computed_again_is_told() {
    for (lines, key, with) in [
        ("gradient_checkpointing = true\nrecompute_layers = 3", "train.recompute_layers", "\"full\""),
        (
            "gradient_checkpointing = \"selective\"\naccumulate_by_block = true",
            "train.accumulate_by_block",
            "\"selective\"",
        ),
    ] {
        let faults = load_text(&format!("{MINIMAL}[train]\n{lines}\n"), "toml", &[]).unwrap_err();
        let told = faults.to_string();
        assert_eq!(faults.faults().len(), 1, "{told}");
        assert!(faults.faults()[0].key == key && told.contains(with), "{told}");
    }
    let more = "gradient_checkpointing = \"full\"\naccumulate_by_block = true";
    assert!(load_text(&format!("{MINIMAL}[train]\n{more}\n"), "toml", &[]).unwrap().train.accumulate_by_block);
}

/// With the keys of every type of adapters and of every objective, which exclude each other in a run.
fn with_every_type() -> RunConfig {
    let mut config = full();
    let lora = &mut config.lora;
    (lora.projection_prng_key, lora.save_projection) = (Some(1), Some(false));
    (lora.vera_dropout, lora.d_initial) = (Some(0.1), Some(0.2));
    (lora.target_r, lora.init_r) = (Some(2), Some(4));
    (lora.tinit, lora.tfinal, lora.deltaT, lora.total_step) = (Some(1), Some(2), Some(3), Some(9));
    (lora.beta1, lora.beta2, lora.orth_reg_weight) = (Some(0.8), Some(0.9), Some(0.3));
    lora.loftq_iter = Some(2);
    config.train.predict_with_generate = true;
    (config.train.pipeline_stages, config.train.pipeline_dtype) = (2, PipelineDType::BFloat16);
    (config.train.recompute_layers, config.train.accumulate_by_block) = (3, true);
    config.train.lr_scheduler_kwargs = "num_cycles = 2".parse().unwrap();
    config.objective = ObjectiveConfig {
        name: ObjectiveName::Dpo,
        beta: Some(0.2),
        reward: Some(RewardName::Number),
        epsilon_high: Some(0.3),
        ..ObjectiveConfig::default()
    };
    config
}

#[test]
fn the_table_of_keys_is_that_of_the_structs() {
    let full = with_every_type();
    let with_steps = TrainConfig { max_steps: Some(1), warmup_steps: Some(1), ..full.train.clone() };
    let full = RunConfig { train: with_steps, ..full };
    let written: BTreeSet<String> = full.flat().unwrap().into_keys().collect();
    let mut listed: BTreeSet<String> = TOP_KEYS.iter().map(|key| key.name.to_string()).collect();
    for (section, keys) in SECTIONS {
        listed.extend(keys.iter().map(|key| format!("{section}.{}", key.name)));
    }
    assert_eq!(written, listed);
    let reference = RunConfig::reference();
    for key in &listed {
        assert!(reference.contains(&format!("| `{key}` |")), "{key}");
    }
    assert!(
        reference.contains("| `model.path` | required |") && reference.contains("| `lora.r` | `8` |"),
        "{reference}"
    );
    let cells = |line: &str| line.replace("\\|", "").matches('|').count();
    assert!(reference.lines().filter(|l| l.starts_with('|')).all(|l| cells(l) == 5), "{reference}");
}

/// Each default is a value that its key allows.
#[test]
fn the_defaults_are_allowed() {
    let mut config = full();
    config.lora = LoraConfig::default();
    config.train = TrainConfig::default();
    config.data = DataConfig { train: config.data.train, ..DataConfig::default() };
    config.model = ModelConfig { path: "base".into(), ..ModelConfig::default() };
    config.validate().unwrap();
    config.seed = u64::MAX;
    assert!(config.validate().is_err());
    config.seed = 0;
    config.lora.lora_alpha = f64::INFINITY;
    assert_eq!(config.validate().unwrap_err().faults()[0].key, "lora.lora_alpha");
}

fn any_config() -> impl Strategy<Value = RunConfig> {
    let text = "[^\0]{0,6}[a-z\"\\\\]";
    let modules = prop_oneof![
        proptest::collection::vec(text, 1..4).prop_map(Modules::Names),
        Just(Modules::Pattern("all-linear".into())),
        "[a-z.*()|]{1,9}".prop_map(Modules::Pattern),
    ];
    let source = (text, proptest::option::of("alpaca|messages|text"), proptest::option::of(1..=i64::MAX as u64))
        .prop_map(|(path, format, max_samples)| SourceConfig {
            path: path.into(),
            format,
            max_samples,
            ..SourceConfig::default()
        });
    let train = (
        prop_oneof![(1e-9f64..1e9).prop_map(|e| (Some(e), None)), (1..=i64::MAX as u64).prop_map(|s| (None, Some(s)))],
        prop_oneof![Just((None, None)), (0f64..=1.0).prop_map(|r| (None, Some(r))), Just((Some(0), None))],
        proptest::sample::select(&ScheduleKind::ALL[1..]),
        1e-12f64..1e6,
        proptest::sample::select(&Checkpointing::ALL[..]),
        0..=i64::MAX as u64,
        2u32..1_000_000,
    );
    (
        text,
        0..=i64::MAX as u64,
        (text, proptest::sample::select(DType::ALL), "auto|cpu|cuda|cuda:[0-7]"),
        (1u32..=65536, 1e-9f64..1e9, 0f64..1.0, modules),
        proptest::collection::btree_map(text, (1u32..=65536, 1e-3f64..1e3), 0..4),
        proptest::collection::vec(source, 1..4),
        proptest::sample::select(Truncation::ALL),
        train,
    )
        .prop_map(|(output, seed, model, lora, patterns, sources, truncation, train)| {
            let mut config = full();
            (config.output_dir, config.seed) = (output.into(), seed);
            (config.model.path, config.model.dtype, config.model.device) = model;
            (config.lora.r, config.lora.lora_alpha, config.lora.lora_dropout, config.lora.target_modules) = lora;
            config.lora.rank_pattern = patterns.iter().rev().map(|(k, (r, _))| (k.clone(), *r)).collect();
            config.lora.alpha_pattern = patterns.iter().rev().map(|(k, (_, a))| (k.clone(), *a)).collect();
            if matches!(config.lora.target_modules, Modules::Pattern(_)) {
                (config.lora.layers_to_transform, config.lora.layers_pattern) = (None, None);
            }
            (config.data.train, config.data.truncation) = (sources, truncation);
            let t = &mut config.train;
            (t.num_train_epochs, t.max_steps) = train.0;
            (t.warmup_steps, t.warmup_ratio) = train.1;
            (t.lr_scheduler_type, t.learning_rate, t.gradient_checkpointing, t.save_steps, t.save_total_limit) =
                (train.2, train.3, train.4, train.5, train.6);
            t.recompute_layers = if train.4.recomputes() { 0 } else { train.6 % 100 };
            config
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn what_is_written_reads_back_equal(config in any_config()) {
        config.validate().unwrap();
        let text = config.to_toml().unwrap();
        prop_assert_eq!(load_text(&text, "toml", &[]).unwrap(), config);
    }

    /// Any text is an error or a configuration, and never a panic; so is any change of a good one.
    #[test]
    fn any_text_is_read_without_a_panic(noise in "\\PC{0,40}", at in any::<proptest::sample::Index>(), yaml in any::<bool>()) {
        let good = full().to_toml().unwrap();
        let places: Vec<usize> = good.char_indices().map(|(i, _)| i).collect();
        let (head, tail) = good.split_at(places[at.index(places.len())]);
        let extension = if yaml { "yaml" } else { "toml" };
        for text in [noise.clone(), format!("{head}{noise}{tail}")] {
            if let Err(e) = load_text(&text, extension, &[]) {
                prop_assert!(!e.faults().is_empty() && !e.to_string().is_empty());
            }
        }
    }
}

#[test]
fn tokens_are_a_list_or_a_table_and_can_be_all_that_is_trained() {
    let with = |lora: &str| format!("{MINIMAL}[lora]\n{lora}\n");
    let tokens = |lora: &str| load_text(&with(lora), "toml", &[]).unwrap().lora.trainable_token_indices.unwrap();
    assert_eq!(tokens("trainable_token_indices = [5, 3]"), Tokens::Embedding(vec![5, 3]));
    assert_eq!(tokens("trainable_token_indices = 5"), Tokens::Embedding(vec![5]));
    let table = tokens("trainable_token_indices = { lm_head = [1] }\ntarget_modules = []");
    assert_eq!(table, Tokens::ByModule([("lm_head".to_string(), vec![1])].into()));
    load_text(&with("target_modules = []\ntarget_parameters = [\"experts.down_proj\"]"), "toml", &[]).unwrap();
    let faults = toml_faults(&with("trainable_token_indices = { lm_head = [-1] }"), &[]);
    assert!(faults.contains("trainable_token_indices") && faults.contains("embed_tokens = [3, 5]"), "{faults}");
    assert!(toml_faults(&with("target_modules = []"), &[]).contains("target_modules"));
    let replicated = toml_faults(&with("layer_replication = [[0, 1]]"), &[]);
    assert!(replicated.contains("layer_replication"), "{replicated}");
}

fn compared(more: &[&str]) -> Result<RunConfig, ConfigErrors> {
    let usual = ["output_dir=x", "model.path=base", "data.train=a.jsonl"];
    let list: Vec<Override> = usual.iter().chain(more).map(|s| s.parse().unwrap()).collect();
    RunConfig::load(None, &list)
}

#[test]
fn an_objective_is_left_out_where_it_is_the_usual_one_and_read_back_where_not() {
    let usual = compared(&[]).unwrap();
    assert!(!usual.to_toml().unwrap().contains("objective") && usual.objective.objective().is_none());
    let more = ["objective.name=dpo", "objective.loss_type=robust", "objective.label_smoothing=0.1"];
    let config = compared(&more).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.toml");
    std::fs::write(&path, config.to_toml().unwrap()).unwrap();
    assert_eq!(RunConfig::load(Some(&path), &[]).unwrap(), config);
    assert!(config.objective.objective().unwrap().needs_reference());
}

#[test]
fn keys_of_another_objective_and_data_that_does_not_fit_are_refused() {
    for (more, key, word) in [
        (&["objective.beta=0.2"][..], "objective.beta", "sft"),
        (&["objective.name=orpo", "objective.reference=start"], "objective.reference", "orpo"),
        (&["objective.name=kto", "objective.loss_type=ipo"], "objective.loss_type", "apo_zero"),
        (&["objective.name=dpo", "objective.label_smoothing=0.5"], "objective.label_smoothing", "below 0.5"),
        (
            &["objective.name=dpo", "objective.loss_type=ipo", "objective.label_smoothing=0.1"],
            "objective.label_smoothing",
            "ipo",
        ),
        (&["objective.name=reward"], "lora.task_type", "SEQ_CLS"),
        (&["objective.name=dpo", "lora.task_type=SEQ_CLS"], "objective.name", "classifier"),
        (&["objective.name=dpo", "data.packing=true"], "data.packing", "pairs"),
        (&["objective.name=dpo", "data.train_on_prompt=true"], "data.train_on_prompt", "never trained"),
        (&["objective.name=dpo", "data.preference=chosen"], "data.preference", "worse"),
        (&["objective.name=dpo", "data.truncation=split"], "data.truncation", "divided"),
        (&["objective.name=ppo"], "objective.name", "dpo"),
        (&["objective.betta=1"], "objective.betta", "beta"),
    ] {
        let faults = compared(more).unwrap_err();
        let fault = faults.0.iter().find(|f| f.key == key).unwrap_or_else(|| panic!("{more:?}: {faults}"));
        assert!(fault.to_string().contains(word), "{more:?}: {fault}");
    }
}

#[test]
fn schedules_take_their_own_options_and_the_best_needs_evaluations() {
    for (more, key) in [
        (&["train.lr_scheduler_type=polynomial", "train.lr_scheduler_kwargs={ power = 2.0, lr_end = 1e-6 }"][..], None),
        (&["train.lr_scheduler_kwargs={ power = 2.0 }"], Some("train.lr_scheduler_kwargs")),
        (
            &["train.lr_scheduler_type=polynomial", "train.lr_scheduler_kwargs={ lr_end = 1.0 }"],
            Some("train.lr_scheduler_kwargs"),
        ),
        (
            &[
                "train.lr_scheduler_type=cosine_with_min_lr",
                "train.lr_scheduler_kwargs={ min_lr = 0, min_lr_rate = 0 }",
            ],
            Some("train.lr_scheduler_kwargs"),
        ),
        (&["train.load_best_model_at_end=true", "train.eval_steps=5", "data.eval_split=0.1"], None),
        (&["train.load_best_model_at_end=true", "train.eval_steps=5"], Some("data.eval_split")),
        (&["train.early_stopping_patience=2", "data.eval_split=0.1"], Some("train.eval_steps")),
        (&["train.metric_for_best_model=eval_meteor"], Some("train.metric_for_best_model")),
        (
            &[
                "train.metric_for_best_model=eval_bleu",
                "train.load_best_model_at_end=true",
                "train.eval_steps=5",
                "data.eval_split=0.1",
            ],
            Some("train.metric_for_best_model"),
        ),
        (
            &[
                "train.metric_for_best_model=eval_rouge_l",
                "train.load_best_model_at_end=true",
                "train.eval_steps=5",
                "data.eval_split=0.1",
                "train.predict_with_generate=true",
            ],
            None,
        ),
        (&["train.predict_with_generate=true"], Some("data.eval_split")),
        (
            &["train.predict_with_generate=true", "data.eval_split=2", "data.train_on_prompt=true"],
            Some("train.predict_with_generate"),
        ),
        (
            &["train.predict_with_generate=true", "data.eval_split=2", "objective.name=dpo"],
            Some("train.predict_with_generate"),
        ),
        (
            &["train.predict_with_generate=true", "data.eval_split=2", "lora.task_type=SEQ_CLS"],
            Some("train.predict_with_generate"),
        ),
        (
            &[
                "train.early_stopping_patience=2",
                "train.eval_steps=5",
                "data.eval_split=0.1",
                "train.metric_for_best_model=eval_macro_f1",
            ],
            Some("train.metric_for_best_model"),
        ),
    ] {
        match (compared(more), key) {
            (Ok(_), None) => {}
            (Err(faults), Some(key)) => assert!(faults.0.iter().any(|f| f.key == key), "{more:?}: {faults}"),
            (other, _) => panic!("{more:?}: {other:?}"),
        }
    }
}
