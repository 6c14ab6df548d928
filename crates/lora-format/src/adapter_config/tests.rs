use super::*;

fn minimal() -> Value {
    json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})
}

fn read(changes: Value) -> Result<AdapterConfig> {
    let mut map = minimal();
    for (key, value) in changes.as_object().unwrap() {
        map[key] = value.clone();
    }
    AdapterConfig::from_json(Path::new("adapter_config.json"), map.as_object().unwrap())
}

fn message(changes: Value) -> String {
    read(changes).unwrap_err().to_string()
}

#[test]
fn the_default_is_written_as_peft_writes_it() {
    // json.dumps(LoraConfig(inference_mode=True).to_dict(), indent=2, sort_keys=True) of peft 0.21.2.
    let wanted = include_str!("peft_default.json");
    let text = serde_json::to_string_pretty(&Value::Object(AdapterConfig::default().to_json())).unwrap();
    assert_eq!(text, wanted.trim_end());
}

#[test]
fn every_value_survives_writing_and_reading() {
    let full = json!({
        "r": 4, "lora_alpha": 8.5, "lora_dropout": 0.05, "bias": "lora_only", "use_rslora": true, "use_dora": true,
        "lora_bias": false, "fan_in_fan_out": true, "init_lora_weights": "pissa_niter_4", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "../../etc/passwd", "target_modules": ["v_proj", "q_proj"], "exclude_modules": ".*7.*",
        "rank_pattern": {"z": 2, "a": 3}, "alpha_pattern": {"z": 1.5}, "layers_to_transform": [0, 2],
        "layers_pattern": "layers", "modules_to_save": ["lm_head"], "revision": "main",
        "trainable_token_indices": {"embed_tokens": [1]}, "ensure_weight_tying": true,
        "megatron_config": {"a": 1}
    });
    let config = read(full.clone()).unwrap();
    let written = config.to_json();
    for (key, value) in full.as_object().unwrap() {
        assert_eq!(&written[key], value, "{key}");
    }
    let again = AdapterConfig::from_json(Path::new("x"), &written).unwrap();
    assert_eq!(again, AdapterConfig { peft_version: Some(PEFT_VERSION.into()), ..config });
    let order: Vec<&str> = again.rank_pattern.iter().map(|(k, _)| k.as_str()).collect();
    assert_eq!(order, ["z", "a"]);
    assert!(written.keys().is_sorted());
}

#[test]
fn impossible_values_are_refused_by_field() {
    let cases = [
        ("r", vec![json!(0), json!(-1), json!(1e9), json!(1_000_000_000), json!(2.5), json!("16"), Value::Null]),
        ("lora_alpha", vec![json!("NaN"), Value::Null, json!([8])]),
        ("lora_dropout", vec![json!(-1), json!(1), json!(2), json!(-1e-9)]),
        ("bias", vec![json!("some"), json!(true)]),
        ("use_dora", vec![json!(1), json!("false")]),
        ("init_lora_weights", vec![json!("magic"), json!(1)]),
        ("target_modules", vec![json!(7), json!([1]), json!("(unclosed"), json!(vec!["q"; 1_000_000])]),
        ("exclude_modules", vec![json!("(unclosed")]),
        ("rank_pattern", vec![json!({"q": 0}), json!({"q": 2.5}), json!({"(": 2}), json!([1])]),
        ("alpha_pattern", vec![json!({"q": "8"}), json!({"(": 2})]),
        ("layers_to_transform", vec![json!(-1), json!("0"), json!([0.5])]),
        ("modules_to_save", vec![json!({"a": 1})]),
        ("target_parameters", vec![json!({"a": 1}), json!([1])]),
        (
            "trainable_token_indices",
            vec![json!([]), json!({}), json!([1, 1]), json!([-1]), json!({"e": [2, 5, 2]}), json!("5")],
        ),
        ("ensure_weight_tying", vec![json!("yes")]),
        ("peft_type", vec![Value::Null, json!(3)]),
    ];
    for (field, values) in cases {
        for value in values {
            let text = message(json!({field: value.clone()}));
            assert!(
                text.starts_with("adapter_config.json: ") && text.contains(&format!("`{field}")),
                "{field}: {text}"
            );
            assert!(text.len() < 500, "{text}");
        }
    }
    assert!(message(json!({"target_modules": "q", "layers_to_transform": 1})).contains("layers_to_transform"));
    assert!(message(json!({"target_modules": "q", "layers_pattern": "h"})).contains("layers_pattern"));
    assert!(message(json!({"layers_pattern": "h"})).contains("layers_to_transform"));
    assert!(message(json!({"peft_type": "IA3"})).contains("only LORA"));
}

#[test]
fn not_a_number_and_infinity_are_refused_with_their_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter_config.json");
    for value in ["NaN", "Infinity", "1e999"] {
        std::fs::write(&path, format!("{{\n\"peft_type\": \"LORA\",\n\"r\": 4,\n\"lora_alpha\": {value}\n}}")).unwrap();
        let text = AdapterConfig::read(&path).unwrap_err().to_string();
        assert!(text.contains(&format!("\"lora_alpha\": {value}")), "{text}");
    }
    let config = AdapterConfig { lora_alpha: f64::NAN, ..AdapterConfig::default() };
    assert!(config.check(&path).unwrap_err().to_string().contains("`lora_alpha`"));
}

#[test]
fn unknown_keys_are_refused_unless_they_say_nothing() {
    let text = message(json!({"use_newlora": true, "new_rate": 0.5, "new_list": []}));
    assert!(
        text.contains("`use_newlora` = true") && text.contains("`new_rate`") && !text.contains("new_list"),
        "{text}"
    );
    let silent = json!({
        "a": null, "b": false, "c": {}, "d": "", "runtime_config": {"ephemeral_gpu_offload": false},
        "auto_mapping": {"base_model_class": "X", "parent_library": "evil"}, "eva_config": {"rho": 2.0},
        "target_parameters": []
    });
    read(silent).unwrap().check_supported(Path::new("x")).unwrap();
}

#[test]
fn what_is_not_implemented_is_refused_by_field() {
    let cases = [
        ("init_lora_weights", json!("pissa_niter_16")),
        ("init_lora_weights", json!("corda")),
        ("layer_replication", json!([[0, 4]])),
        ("megatron_config", json!({"x": 1})),
        ("alora_invocation_tokens", json!([1])),
        ("ensure_weight_tying", json!(true)),
        ("use_qalora", json!(true)),
    ];
    for (field, value) in cases {
        let config = read(json!({field: value.clone()})).unwrap();
        match config.check_supported(Path::new("adapter_config.json")).unwrap_err() {
            Error::Unsupported { field: named, value: shown, .. } => {
                assert_eq!((named.as_str(), shown), (field, value.to_string()));
            }
            other => panic!("{other}"),
        }
    }
    for init in [json!(true), json!(false), json!("gaussian"), json!("orthogonal"), json!("pissa"), json!("olora")] {
        read(json!({"init_lora_weights": init})).unwrap().check_supported(Path::new("x")).unwrap();
    }
}

#[test]
fn loftq_is_read_with_its_settings_and_written_as_peft_writes_it() {
    let named =
        |settings: serde_json::Value| read(json!({"init_lora_weights": "loftq", "loftq_config": settings})).unwrap();
    for (settings, iterations) in [(json!({}), 1), (json!({"loftq_bits": 4, "loftq_iter": 3}), 3)] {
        let config = named(settings);
        config.check_supported(Path::new("x")).unwrap();
        assert_eq!(config.loftq_iterations(), Some(iterations));
    }
    assert_eq!(read(json!({"loftq_config": {"loftq_iter": 3}})).unwrap().loftq_iterations(), None);
    for (settings, field) in [(json!({"loftq_bits": 8}), "loftq_bits"), (json!({"loftq_iter": 0}), "loftq_iter")] {
        let error = named(settings).check_supported(Path::new("x")).unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }
    let written = AdapterConfig::default().with_loftq(2);
    assert_eq!(written.other["loftq_config"], json!({"loftq_bits": 4, "loftq_iter": 2}));
    assert_eq!(written.loftq_iterations(), Some(2));
}

#[test]
fn patterns_match_from_a_component_to_the_end_and_the_first_counts() {
    let config = read(json!({
        "rank_pattern": {"layers.1.self_attn.q_proj": 6, "up_proj": 2, ".*_proj": 3, "k|v": 5},
        "alpha_pattern": {"v_proj": 32}
    }))
    .unwrap();
    let rank = |path: &str| config.rank_of(path).unwrap();
    assert_eq!(rank("model.layers.1.self_attn.q_proj"), 6);
    assert_eq!(rank("model.layers.11.self_attn.q_proj"), 3, "`1` must not match inside `11`, `.*_proj` does match");
    assert_eq!(rank("model.layers.0.mlp.up_proj"), 2);
    assert_eq!((rank("model.layers.0.k"), rank("model.layers.0.kk"), rank("lm_head")), (5, 4, 4));
    assert_eq!(config.alpha_of("model.layers.0.self_attn.v_proj").unwrap(), 32.0);
    assert_eq!(config.alpha_of("model.layers.0.self_attn.q_proj").unwrap(), 8.0);
}

#[test]
fn parameters_and_tokens_are_read_with_what_peft_allows_beside_them() {
    let config = read(json!({"target_parameters": ["experts.down_proj"], "use_rslora": true})).unwrap();
    assert_eq!(config.target_parameters.as_deref(), Some(&["experts.down_proj".to_string()][..]));
    config.check_supported(Path::new("x")).unwrap();
    for (field, value) in [
        ("lora_dropout", json!(0.1)),
        ("lora_bias", json!(true)),
        ("use_dora", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("init_lora_weights", json!("pissa")),
    ] {
        let text = message(json!({"target_parameters": ["experts.down_proj"], field: value}));
        assert!(text.contains(&format!("`{field}`")) && text.contains("target_parameters"), "{text}");
    }
    let tokens =
        json!({"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [5]}, "ensure_weight_tying": true});
    let config = read(tokens).unwrap();
    config.check_supported(Path::new("x")).unwrap();
    let indices = config.trainable_token_indices.unwrap();
    assert_eq!(indices.of("model.embed_tokens"), Some(&[7, 3][..]));
    assert_eq!((indices.of("lm_head"), indices.of("model.norm")), (Some(&[5][..]), None));
}

#[test]
fn tokens_alone_are_peft_s_method_of_that_name() {
    let alone = AdapterConfig {
        target_modules: Some(TargetModules::List(Vec::new())),
        trainable_token_indices: Some(TokenIndices::ByModule(vec![("embed_tokens".into(), vec![7, 3])])),
        task_type: Some("CAUSAL_LM".into()),
        ..AdapterConfig::default()
    };
    let written = alone.to_json();
    assert_eq!((&written["peft_type"], &written["token_indices"]), (&json!("TRAINABLE_TOKENS"), &json!([7, 3])));
    assert_eq!(AdapterConfig::from_json(Path::new("x"), &written).unwrap(), alone);
    let unknown = json!({"peft_type": "TRAINABLE_TOKENS", "token_indices": [1], "rows": 4});
    let text = AdapterConfig::from_json(Path::new("x"), unknown.as_object().unwrap()).unwrap_err().to_string();
    assert!(text.contains("`rows`"), "{text}");
    // With a target they are a part of LoRA.
    let beside = AdapterConfig { target_modules: Some(TargetModules::List(vec!["q_proj".into()])), ..alone };
    assert_eq!(beside.to_json()["peft_type"], json!("LORA"));
}
