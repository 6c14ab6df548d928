use super::*;
use proptest::prelude::*;

const RIGHT: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";

fn tensor(name: &str) -> (String, Vec<KeyRule>) {
    match repair_key(name) {
        Some((RepairedKey::Tensor { module, end }, rules)) => (adapter_key(&module, &end), rules),
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn each_history_is_taken_back_by_its_rule() {
    let default = || KeyRule::AdapterName("default".into());
    for (damaged, wanted, rule) in [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", RIGHT, KeyRule::NoPrefix),
        (
            "base_model.model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            RIGHT,
            KeyRule::DoubledPrefix,
        ),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", RIGHT, default()),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A", RIGHT, KeyRule::BareMatrix),
        (
            "_orig_mod.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            RIGHT,
            KeyRule::Wrapper("_orig_mod"),
        ),
        (
            "base_model.model._orig_mod.model.layers.0.self_attn.q_proj.lora_A.weight",
            RIGHT,
            KeyRule::Wrapper("_orig_mod"),
        ),
        ("module.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", RIGHT, KeyRule::Wrapper("module")),
        (
            "base_model.model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.lora_A.weight",
            RIGHT,
            KeyRule::Wrapper("_fsdp_wrapped_module"),
        ),
        (
            "base_model.model.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.lora_A.weight",
            RIGHT,
            KeyRule::Wrapper("_checkpoint_wrapped_module"),
        ),
        ("model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", RIGHT, KeyRule::Holder("model.")),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_down.weight", RIGHT, KeyRule::DownUp),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora.down.weight", RIGHT, KeyRule::DownUp),
        (
            "base_model.model.a.lora_magnitude_vector.weight",
            "base_model.model.a.lora_magnitude_vector",
            KeyRule::OldMagnitude,
        ),
        ("base_model.model.a.lora_magnitude_vector.default", "base_model.model.a.lora_magnitude_vector", default()),
        (
            "base_model.model.a.lora_magnitude_vector.default.weight",
            "base_model.model.a.lora_magnitude_vector",
            default(),
        ),
        ("base_model.model.a.lora_embedding_B.default", "base_model.model.a.lora_embedding_B", default()),
        ("base_model.model.a.lora_B.default.bias", "base_model.model.a.lora_B.bias", default()),
        ("base_model.model.lm_head.modules_to_save.default.weight", "base_model.model.lm_head.weight", default()),
        (
            "base_model.model.classifier.modules_to_save.default.dense.bias",
            "base_model.model.classifier.dense.bias",
            default(),
        ),
    ] {
        assert_eq!(tensor(damaged), (wanted.to_string(), vec![rule]), "{damaged}");
    }
    let (name, rules) = tensor("module._orig_mod.model.layers.0.self_attn.q_proj.lora_A.poet.weight");
    assert_eq!((name.as_str(), rules.len()), (RIGHT, 4));
    let alpha = repair_key("base_model.model.a.b.alpha");
    assert_eq!(alpha, Some((RepairedKey::Alpha { module: "a.b".into() }, vec![])));
}

#[test]
fn what_no_rule_explains_is_left_alone() {
    for name in [
        "thinker.base_model.model.model.layers.0.q.lora_A.weight",
        "base_model.layers.0.q.lora_A.weight",
        "base_model.model.a.lora_A.one.two.weight",
        "base_model.model.a.lora_C.weight",
        "base_model.model.lm_head.original_module.weight",
        "lora_unet_down_blocks_0_attn.hada_w1_a",
    ] {
        assert_eq!(repair_key(name), None, "{name}");
    }
    // A layer may be called `module`.
    let name = "base_model.model.encoder.module.q.lora_A.weight";
    assert_eq!(tensor(name), (name.to_string(), vec![]));
}

#[test]
fn the_model_decides_where_a_module_is_at_home() {
    let holds = |known: &'static [&'static str]| move |path: &str| known.contains(&path);
    let text: &[&str] = &["model.layers.0.q", "lm_head"];
    let (path, rule) = rehome("model.language_model.layers.0.q", holds(text)).unwrap().unwrap();
    assert_eq!(path, "model.layers.0.q");
    assert_eq!(rule, KeyRule::Path { from: "model.language_model.".into(), to: "model.".into() });
    assert_eq!(rehome("language_model.model.layers.0.q", holds(text)).unwrap().unwrap().0, "model.layers.0.q");
    assert_eq!(rehome("layers.0.q", holds(text)).unwrap().unwrap().0, "model.layers.0.q");
    assert_eq!(rehome("language_model.lm_head", holds(text)).unwrap().unwrap().0, "lm_head");
    assert_eq!(rehome("model.layers.0.q", holds(text)), Ok(None));
    let seeing: &[&str] = &["model.language_model.layers.0.q"];
    assert_eq!(rehome("model.layers.0.q", holds(seeing)).unwrap().unwrap().0, seeing[0]);
    assert_eq!(rehome("model.layers.9.q", holds(text)), Err(vec![]));
    let both: &[&str] = &["model.layers.0.q", "language_model.model.layers.0.q"];
    assert_eq!(rehome("layers.0.q", holds(both)).unwrap_err().len(), 2);
}

/// Ways to damage a right name.
fn damaged(name: &str, how: &[u8]) -> String {
    let mut name = name.to_string();
    let (mut named, mut headless) = (false, false);
    for step in how {
        let before = |what: &str, name: &str| format!("{what}{name}");
        name = match step % 8 {
            0 => before("_orig_mod.", &name),
            1 => name.replacen("layers.", "layers._fsdp_wrapped_module.", 1),
            2 => name.replacen("self_attn.", "_checkpoint_wrapped_module.self_attn.", 1),
            3 if !headless => before("module.", &name),
            4 if !headless => before(PREFIX, &name),
            5 if !named => {
                named = true;
                name.replacen("lora_A.", "lora_A.default.", 1).replacen("lora_B.", "lora_B.default.", 1)
            }
            6 if !headless && name.starts_with(PREFIX) => {
                headless = true;
                name.trim_start_matches(PREFIX).to_string()
            }
            _ => name,
        };
    }
    name
}

proptest! {
    #[test]
    fn whatever_was_done_to_a_name_is_undone(
        layer in 0u32..100, part in "[a-z]{1,8}_proj", end in prop::sample::select(&["lora_A.weight", "lora_B.weight", "lora_B.bias"][..]),
        how in prop::collection::vec(0u8..8, 0..8),
    ) {
        let right = format!("base_model.model.model.layers.{layer}.self_attn.{part}.{end}");
        let (name, rules) = tensor(&damaged(&right, &how));
        prop_assert_eq!(&name, &right);
        // And what was right stays, without a rule.
        prop_assert_eq!(tensor(&right), (right.clone(), vec![]));
        prop_assert!(rules.len() <= 8);
    }

    #[test]
    fn a_repaired_name_needs_no_repair(name in "[a-zA-Z_.]{0,40}") {
        if let Some((RepairedKey::Tensor { module, end }, _)) = repair_key(&name) {
            let once = adapter_key(&module, &end);
            prop_assert_eq!(tensor(&once).0, once);
        }
    }
}
