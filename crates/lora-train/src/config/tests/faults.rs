//! Configurations that are at fault, and what is said of them.

use super::*;

#[test]
fn all_faults_are_reported_at_once() {
    let text = r#"output_dir = 3
seed = -1
lerning_rate = 1e-4

[model]
dtype = "int8"
device = "gpu"
r = 4

[lora]
r = "16"
lora_alpha = nan
lora_dropout = 1.0
lora_alhpa = 3
loftq_config = true
target_modules = "q_proj,v_proj"
rank_pattern = { q_proj = 0 }

[data]
train = [{ path = "a", fromat = "alpaca" }, { max_samples = 0 }]
eval_split = 1.5

[train]
max_steps = 5
num_train_epochs = 2
lr = 1e-4
fp16 = true
learning_rate = -1e-4
save_total_limit = 1
lr_scheduler_type = "stepwise"
warmup_steps = 0.1

[trian]
"#;
    let shown = toml_faults(text, &["train.max_grad_norm=-1", "train.adam_beta1=true"]);
    let expected = [
        ":1: output_dir = 3: must be a text that is not empty",
        ":2: seed = -1: must be an integer of at least 0",
        ":3: unknown key `lerning_rate`; did you mean `train.learning_rate`?",
        ":6: model.dtype = \"int8\": must be one of \"auto\", \"float32\", \"bfloat16\", \"float16\"",
        ":7: model.device = \"gpu\": must be one of \"auto\", \"cpu\", \"cuda\", \"cuda:N\"",
        ":8: unknown key `model.r`; did you mean `lora.r`?",
        ":11: lora.r = \"16\": must be an integer from 1 to 65536",
        ":12: lora.lora_alpha = nan: must be a finite number above 0",
        ":13: lora.lora_dropout = 1.0: must be a number from 0 to below 1",
        ":14: unknown key `lora.lora_alhpa`; did you mean `lora.lora_alpha`?",
        ":15: lora.loftq_config = true: is not supported yet; remove it",
        ":16: lora.target_modules = \"q_proj,v_proj\": must be a list of names",
        ":17: lora.rank_pattern = { q_proj = 0 }: must be a table whose values are each an integer from 1 to 65536",
        ":20: unknown key `data.train[0].fromat`; did you mean `data.train[0].format`?",
        ":20: data.train[1].max_samples = 0: must be an integer of at least 1",
        ":20: data.train[1].path is missing",
        ":21: data.eval_split = 1.5: must be 0, a fraction below 1, or a whole number of examples",
        ":24: train.max_steps = 5 contradicts train.num_train_epochs = 2: keep one of them",
        ":26: unknown key `train.lr`; did you mean `train.learning_rate`?",
        ":27: train.fp16 = true: is not needed: set model.dtype = \"float16\"",
        ":28: train.learning_rate = -0.0001: must be a finite number above 0",
        ":29: train.save_total_limit = 1: must be an integer from 2 to 1000000",
        ":30: train.lr_scheduler_type = \"stepwise\": must be one of \"constant\", \"linear\", \"cosine\", \"constant_with_warmup\", \"cosine_with_restarts\", \"cosine_with_min_lr\", \"polynomial\", \"inverse_sqrt\", \"warmup_stable_decay\"",
        ":31: train.warmup_steps = 0.1: must be an integer of at least 0",
        ":33: unknown key `trian`; did you mean `[train]`?",
        ":5: model.path is missing: give --model DIR",
        "--set: train.max_grad_norm = -1: must be a finite number of at least 0",
        "--set: train.adam_beta1 = true: must be a number from 0 to below 1",
    ];
    for part in expected {
        assert!(shown.contains(part), "not in the message: {part}\n{shown}");
    }
    assert!(shown.starts_with(&format!("the configuration has {} faults:\n", expected.len())), "{shown}");
}

#[test]
fn every_contradiction_is_refused() {
    for (section, lines, key) in [
        ("train", "max_steps = 5\nnum_train_epochs = 1.0", "train.max_steps"),
        ("train", "warmup_steps = 5\nwarmup_ratio = 0.1", "train.warmup_steps"),
        ("train", "warmup_steps = 6\nmax_steps = 5", "train.warmup_steps"),
        ("train", "warmup_steps = 6\nlr_scheduler_type = \"constant\"", "train.warmup_steps"),
        ("train", "warmup_ratio = 0.1\nlr_scheduler_type = \"constant\"", "train.warmup_ratio"),
        ("lora", "target_modules = \".*q\"\nlayers_to_transform = [0]", "lora.layers_to_transform"),
        ("lora", "target_modules = [\"q\"]\nlayers_pattern = [\"h\"]", "lora.layers_to_transform"),
        ("lora", "target_modules = []", "lora.target_modules"),
        ("lora", "init_adapter = \"a\"\n[train]\nfinetuning_type = \"full\"", "lora.init_adapter"),
    ] {
        let e = load_text(&format!("{MINIMAL}[{section}]\n{lines}\n"), "toml", &[]).unwrap_err();
        assert_eq!(e.faults().iter().map(|f| f.key.as_str()).collect::<Vec<_>>(), [key], "{lines}: {e}");
    }
    let e = toml_faults(&format!("{MINIMAL}eval = \"e\"\neval_split = 0.1\n"), &[]);
    assert!(e.contains("data.eval_split = 0.1 contradicts data.eval"), "{e}");
    // What excludes nothing is allowed.
    for lines in ["warmup_steps = 0\nlr_scheduler_type = \"constant\"", "warmup_steps = 5\nmax_steps = 5"] {
        load_text(&format!("{MINIMAL}[train]\n{lines}\n"), "toml", &[]).unwrap();
    }
    load_text(&format!("{MINIMAL}[lora]\nlayers_to_transform = [0, 2]\n"), "toml", &[]).unwrap();
}

#[test]
fn foreign_keys_pass_only_when_they_ask_for_nothing() {
    let harmless = "use_qalora = false\nloftq_config = {}\npeft_type = \"LORA\"\nlayer_replication = []\n[train]\noptim = \"adamw_torch\"\nfp16 = false\nreport_to = \"none\"\n";
    load_text(&format!("{MINIMAL}[lora]\n{harmless}"), "toml", &[]).unwrap();
    for (section, line, part) in [
        ("lora", "loftq_config = { loftq_bits = 4 }", "not supported yet"),
        ("lora", "init_lora_weights = \"corda\"", "must be true, false or \"gaussian\""),
        ("lora", "init_lora_weights = \"pissa_niter_x\"", "\"pissa_niter_N\""),
        ("lora", "bias = \"some\"", "must be one of \"none\""),
        ("train", "optim = \"adafactor\"", "one of \"adamw\", \"lion\", \"adamw_8bit\""),
        ("model", "trust_remote_code = true", "never run"),
        ("train", "max_seq_length = 9", "did you mean `data.max_length`"),
        ("lora", "lora_rank = 9", "did you mean `lora.r`"),
        ("train", "seed = 9", "did you mean `seed`"),
    ] {
        let text = format!("{}[{section}]\n{line}\n", if section == "model" { "" } else { MINIMAL });
        let e = toml_faults(&text, &[]);
        assert!(e.contains(part), "{line}: {e}");
    }
}

#[test]
fn overrides_go_first() {
    let text = format!("{MINIMAL}[train]\nlearning_rate = 1.0\nnum_train_epochs = 4\nwarmup_ratio = 0.5\n");
    let settings = [
        "train.learning_rate=1e-4",
        "train.max_steps=9",
        "train.warmup_steps=2",
        "output_dir=2024",
        "lora.r=4",
        "lora.r=5",
    ];
    let config = load_text(&text, "toml", &settings).unwrap();
    assert_eq!((config.train.learning_rate, config.lora.r), (1e-4, 5));
    assert_eq!((config.train.length(), config.train.num_train_epochs), (Length::Steps(9), None));
    assert_eq!((config.train.warmup(100), config.train.warmup_ratio), (2, None));
    assert_eq!(config.output_dir, Path::new("2024"));
    let both = toml_faults(&text, &["train.max_steps=9", "train.num_train_epochs=1"]);
    assert!(both.contains("--set: train.max_steps = 9 contradicts train.num_train_epochs = 1"), "{both}");
    let inside = toml_faults(&text, &["output_dir.x=9"]);
    assert!(inside.contains("`output_dir` is not a section"), "{inside}");
    let pattern = load_text(&text, "toml", &["lora.rank_pattern.\"layers.0\"=4"]).unwrap();
    assert_eq!(pattern.lora.rank_pattern, [("layers.0".to_string(), 4)]);
    let flag = Override::text("model.path", "1e-4");
    assert_eq!(
        RunConfig::load(None, &[flag]).unwrap_err().faults().iter().filter(|f| f.key == "model.path").count(),
        0
    );
}

#[test]
fn files_that_are_not_configurations_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    let missing = RunConfig::load(Some(&path), &[]).unwrap_err();
    assert!(missing.to_string().contains("run.toml: cannot be read"), "{missing}");
    assert!(std::error::Error::source(&missing).unwrap().is::<std::io::Error>());
    for (bytes, part) in [
        (b"a = 1\nb = = 2\n".to_vec(), "run.toml:2: "),
        (b"a = 1\na = 2\n".to_vec(), "run.toml:2: duplicate key"),
        (b"\xff\xfe".to_vec(), "not UTF-8"),
        (vec![b'#'; 2 << 20], "longer than 1 MiB"),
        (b"seed = 99999999999999999999\n".to_vec(), "run.toml:1: "),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let e = RunConfig::load(Some(&path), &[]).unwrap_err().to_string();
        assert!(e.contains(part), "{part}: {e}");
    }
    for (text, part) in [
        ("- a\n- b\n", "must be a mapping"),
        ("a: [1\n", "run.yaml:"),
        ("seed: 18446744073709551615\n", "too large an integer"),
        ("seed: 1\nseed: 2\n", "duplicate"),
        ("1: 2\n", "is not a text"),
        ("seed: !x 1\n", "tag"),
        ("data: {train: [null]}\n", "a list holds a null"),
    ] {
        let e = load_text(text, "yaml", &[]).unwrap_err().to_string();
        assert!(e.contains(part), "{text}: {e}");
    }
    let bom = format!("\u{feff}{MINIMAL}");
    load_text(&bom, "toml", &[]).unwrap();
}
