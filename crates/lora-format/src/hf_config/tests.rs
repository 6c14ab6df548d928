use super::*;
use serde_json::json;

fn base(model_type: &str) -> Value {
    json!({
        "model_type": model_type, "vocab_size": 320, "hidden_size": 32, "intermediate_size": 80,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2
    })
}

fn with(model_type: &str, changes: Value) -> Value {
    let mut config = base(model_type);
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn read(config: &Value) -> Result<HfConfig> {
    let empty = Map::new();
    let generation = Fields::new(Path::new("generation_config.json"), "", &empty);
    from_json(Path::new("config.json"), config.as_object().unwrap().clone(), generation)
}

fn message(changes: Value) -> String {
    read(&with("llama", changes)).unwrap_err().to_string()
}

#[test]
fn a_sparse_config_gets_the_defaults_of_its_family() {
    let llama = read(&base("llama")).unwrap();
    assert_eq!((llama.head_dim, llama.max_position_embeddings, llama.sliding_window), (8, 2048, None));
    assert_eq!((llama.bos_token_id, llama.eos_token_ids, llama.tie_word_embeddings), (Some(1), vec![2], false));
    assert_eq!((llama.rope.rope_type.as_str(), llama.rope.rope_theta), ("default", 10_000.0));

    let mistral = read(&base("mistral")).unwrap();
    assert_eq!((mistral.sliding_window, mistral.max_position_embeddings), (Some(4096), 131_072));
    assert_eq!(read(&with("mistral", json!({"sliding_window": null}))).unwrap().sliding_window, None);

    let qwen3 = read(&base("qwen3")).unwrap();
    assert_eq!((qwen3.head_dim, qwen3.sliding_window, qwen3.eos_token_ids), (128, None, vec![]));
    assert_eq!(qwen3.layer_types.unwrap(), ["full_attention"; 2]);
    let sliding = json!({"use_sliding_window": true, "sliding_window": 7, "max_window_layers": 1});
    let sliding = read(&with("qwen2", sliding)).unwrap();
    assert_eq!((sliding.sliding_window, sliding.head_dim), (Some(7), 8));
    assert_eq!(sliding.layer_types.unwrap(), ["full_attention", "sliding_attention"]);
}

#[test]
fn a_missing_key_value_head_count_differs_from_null() {
    let mut config = with("qwen2", json!({"num_attention_heads": 64, "hidden_size": 512}));
    config.as_object_mut().unwrap().remove("num_key_value_heads");
    assert_eq!(read(&config).unwrap().num_key_value_heads, 32);
    config["num_key_value_heads"] = Value::Null;
    assert_eq!(read(&config).unwrap().num_key_value_heads, 64);
}

#[test]
fn old_and_new_rope_forms_say_the_same() {
    let table = json!({
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 32
    });
    let mut old = table.clone();
    old["type"] = json!("llama3");
    let mut new = table;
    new["rope_type"] = json!("llama3");
    new["rope_theta"] = json!(500_000.0);
    let old = json!({"rope_theta": 500_000, "rope_scaling": old, "torch_dtype": "bfloat16"});
    let old = read(&with("llama", old)).unwrap();
    let new = read(&with("llama", json!({"rope_parameters": new, "dtype": "torch.bfloat16"}))).unwrap();
    assert_eq!(old.rope, new.rope);
    assert_eq!((old.rope.factor, old.rope.original_max_position_embeddings), (Some(8.0), Some(32)));
    assert_eq!((old.dtype.as_deref(), new.dtype.as_deref()), (Some("bfloat16"), Some("bfloat16")));

    let su = json!({"type": "su", "short_factor": [1, 1, 1, 1.5], "long_factor": [2, 2, 2, 2]});
    let su = read(&with("llama", json!({"rope_scaling": su, "max_position_embeddings": 64}))).unwrap();
    assert_eq!((su.rope.rope_type.as_str(), su.rope.original_max_position_embeddings), ("longrope", Some(64)));
}

#[test]
fn ending_tokens_of_the_generation_config_go_first() {
    let config = with("llama", json!({"eos_token_id": [2, 5], "pad_token_id": -1, "bos_token_id": null}));
    let read_with = |generation: Value| {
        let generation = generation.as_object().unwrap().clone();
        let generation = Fields::new(Path::new("generation_config.json"), "", &generation);
        from_json(Path::new("config.json"), config.as_object().unwrap().clone(), generation).unwrap()
    };
    assert_eq!(read_with(json!({"eos_token_id": [7, 8]})).eos_token_ids, [7, 8]);
    assert_eq!(read_with(json!({"eos_token_id": 7})).eos_token_ids, [7]);
    let plain = read_with(json!({"eos_token_id": null}));
    assert_eq!((plain.eos_token_ids, plain.pad_token_id, plain.bos_token_id), (vec![2, 5], None, None));
}

#[test]
fn impossible_values_are_refused_by_name_before_anything_is_made_of_them() {
    for key in ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"] {
        for value in [json!(0), json!(-1), json!(1i64 << 40), json!(2.5), json!("16"), Value::Null] {
            let text = message(json!({key: value.clone()}));
            assert!(text.starts_with("config.json: ") && text.contains(&format!("`{key}`")), "{key} {value}: {text}");
        }
    }
    let huge = message(json!({"vocab_size": i32::MAX, "hidden_size": i32::MAX, "head_dim": 1}));
    assert!(huge.contains("2147483647"), "{huge}");
    assert!(message(json!({"num_key_value_heads": 3})).contains("divisor of num_attention_heads"));
    assert!(message(json!({"hidden_size": 33})).contains("multiple of num_attention_heads"));
    assert!(message(json!({"rms_norm_eps": 0.0})).contains("rms_norm_eps"));
    assert!(message(json!({"layer_types": ["full_attention"]})).contains("2 entries"));
    assert!(message(json!({"dtype": "float8_e4m3fn"})).contains("float8_e4m3fn"));
    assert!(message(json!({"eos_token_id": "</s>"})).contains("eos_token_id"));
    assert!(message(json!({"rope_theta": -1.0})).contains("rope_theta"));
    assert!(message(json!({"rope_scaling": {"type": "sinus", "factor": 2.0}})).contains("rope_scaling.type"));
    assert!(message(json!({"rope_scaling": {"type": "linear"}})).contains("rope_scaling.factor"));
    assert!(message(json!({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}})).contains("short_factor"));
    let llama3 = json!({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0});
    assert!(message(json!({"rope_parameters": llama3})).contains("high_freq_factor"));
    assert!(message(json!({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}})).contains("not supported"));
}

#[test]
fn custom_code_and_quantised_weights_are_refused_with_the_reason() {
    assert!(message(json!({"auto_map": {"AutoModel": "modeling.X"}})).contains("never run"));
    assert!(message(json!({"trust_remote_code": true})).contains("trust_remote_code"));
    let packed = |more: Value| {
        let mut settings = json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"});
        settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"quantization_config": settings})
    };
    for (settings, named) in [
        (json!({"quantization_config": {"bits": 4}}), "quantization_config.quant_method"),
        (json!({"quantization_config": {"quant_method": "awq", "bits": 4}}), "\"awq\""),
        (packed(json!({"quant_method": "gptq"})), "quantization_config.quant_method` = \"gptq\""),
        (packed(json!({"bnb_4bit_quant_type": "fp4"})), "bnb_4bit_quant_type` = \"fp4\""),
        (packed(json!({"bnb_4bit_quant_type": null})), "bnb_4bit_quant_type"),
        (packed(json!({"load_in_4bit": false})), "load_in_4bit"),
        (packed(json!({"load_in_8bit": true})), "load_in_4bit"),
        (packed(json!({"load_in_4bit": "yes"})), "load_in_4bit"),
        (json!({"quantization_config": "nf4"}), "quantization_config"),
    ] {
        let told = message(settings.clone());
        assert!(told.contains(named), "{settings}: {told}");
        assert!(told.contains("bfloat16") || told.contains("must be"), "{settings}: {told}");
    }
    for settings in [
        packed(json!({})),
        packed(json!({"load_in_4bit": false, "load_in_8bit": true, "bnb_4bit_quant_type": "fp4"})),
        json!({"quantization_config": {"load_in_8bit": true}}),
        json!({"quantization_config": null}),
    ] {
        assert!(read(&with("llama", settings.clone())).is_ok(), "{settings}");
    }
    assert!(read(&with("llama", json!({"auto_map": null, "trust_remote_code": false}))).is_ok());
}
