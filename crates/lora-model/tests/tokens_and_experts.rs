//! Trained tokens and adapters of stacked experts: gradients in float64, what is trained and saved, several at run time, and
//! what is refused before a weight is read.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

mod common;

use common::{distance, fixtures, load, unpadded};
use lora_format::{
    AdapterConfig, AdapterFolder, AdapterModule, STACKED, TargetModules, TensorFile, TokenIndices, read_adapter,
    write_adapter,
};
use lora_model::{
    AdapterSet, Decoder, Error, Head, InjectionPlan, Mode, ModelConfig, TokenBatch, check_adapter, plan_injection,
    stacks,
};
use std::path::PathBuf;
use tch::{Device, Kind, Tensor};

/// Sums in float32 in another order.
const SAME: f64 = 1e-5;
/// Central differences in float64 with a step of 1e-5: the third derivative leaves some 1e-9 of the gradient's size.
const DIFFERENCE_TOLERANCE: f64 = 1e-6;
const DIFFERENCE_STEP: f64 = 1e-5;

fn adapter(family: &str, variant: &str) -> PathBuf {
    fixtures().join(family).join("adapters").join(variant)
}

fn batch_of(model: &Decoder, family: &str) -> TokenBatch {
    unpadded(model, &TensorFile::open(&fixtures().join(family).join("reference.safetensors")).unwrap()).0
}

fn with(family: &str, variant: &str) -> (Decoder, TokenBatch) {
    let mut model = load(&fixtures().join(family));
    model.load_adapter(&read_adapter(&adapter(family, variant)).unwrap()).unwrap();
    let batch = batch_of(&model, family);
    (model, batch)
}

fn logits(model: &Decoder, batch: &TokenBatch) -> Tensor {
    tch::no_grad(|| model.logits(&model.hidden(batch, Mode::Eval, None).unwrap()).unwrap())
}

/// A model in float64 whose adapter is, too: rows as they are read are float32, those of a float64 table are not.
fn in_float64(family: &str, variant: &str) -> (Decoder, TokenBatch) {
    let mut model = Decoder::load(&fixtures().join(family), Kind::Double, Device::Cpu, &mut |_, _| {}).unwrap();
    let folder = read_adapter(&adapter(family, variant)).unwrap();
    model.load_adapter(&folder).unwrap();
    for p in model.parameters() {
        let mut leaf = p.tensor;
        leaf.set_data(&leaf.detach().to_kind(Kind::Double));
    }
    let batch = batch_of(&model, family);
    (model, batch)
}

#[test]
fn gradients_are_the_differences_of_the_loss_in_float64() {
    let cases = [("llama", "tokens"), ("qwen2", "tokens"), ("qwen2", "tokens_apart"), ("mixtral", "experts")];
    for (family, variant) in cases {
        let (model, batch) = in_float64(family, variant);
        let _loss = model.loss_and_backward(&batch, 0, 1.0, false).unwrap();
        let loss = || tch::no_grad(|| model.loss(&batch, Mode::Eval).unwrap()).double_value(&[]);
        let mut checked = 0;
        for p in model.parameters() {
            if !(p.name.contains("experts") || p.name.contains("tokens")) || p.name.contains("layers.1") {
                continue;
            }
            assert_eq!(p.tensor.kind(), Kind::Double, "{}", p.name);
            // A direction through all of the leaf: one pair of losses checks every entry.
            tch::manual_seed(7);
            let direction = Tensor::randn_like(&p.tensor);
            let mut leaf = p.tensor.detach();
            let mut moved = |by: f64| {
                let _ = leaf.g_add_(&(&direction * by));
                loss()
            };
            let up = moved(DIFFERENCE_STEP);
            let down = moved(-2.0 * DIFFERENCE_STEP);
            moved(DIFFERENCE_STEP);
            let difference = (up - down) / (2.0 * DIFFERENCE_STEP);
            let wanted = (p.tensor.grad() * &direction).sum(Kind::Double).double_value(&[]);
            let error = (difference - wanted).abs() / wanted.abs().max(1.0);
            assert!(error < DIFFERENCE_TOLERANCE, "{family}/{variant} {}: {difference} and {wanted}", p.name);
            checked += 1;
        }
        assert!(checked > 0, "{family}/{variant}");
    }
}

#[test]
fn rows_alone_are_trained_and_the_tables_have_no_gradient() {
    for (family, variant, leaves, sizes) in [
        ("llama", "tokens_alone", 1, vec![[4, 32]]),
        ("qwen2", "tokens_alone", 1, vec![[4, 32]]),
        ("qwen2", "tokens_apart", 2, vec![[3, 32], [2, 32]]),
    ] {
        let (model, batch) = with(family, variant);
        let _loss = model.loss_and_backward(&batch, 0, 1.0, true).unwrap();
        let Head::Language(head) = &model.head else { panic!("{family}") };
        assert!(!model.embed_tokens.weight.requires_grad() && !head.weight.plain().unwrap().requires_grad());
        let rows: Vec<_> = model.parameters().into_iter().filter(|p| p.name.contains("token_adapter")).collect();
        assert_eq!(rows.len(), leaves, "{family}/{variant}");
        let found: Vec<Vec<i64>> = rows.iter().map(|p| p.tensor.grad().size()).collect();
        assert_eq!(found, sizes, "{family}/{variant}");
    }
    // Token 318 is not in the batch: with a head that is not tied nothing reaches its row, and 22 is in it.
    let (model, batch) = with("llama", "tokens");
    let _loss = model.loss_and_backward(&batch, 0, 1.0, false).unwrap();
    let rows = model.parameters().pop().unwrap();
    let norm = |i: i64| rows.tensor.grad().get(i).norm().double_value(&[]);
    assert!(norm(0) > 0.0 && norm(3) == 0.0, "{} {}", norm(0), norm(3));
}

#[test]
fn what_is_saved_is_read_back_bit_for_bit() {
    for (family, variant) in [
        ("llama", "tokens"),
        ("qwen2", "tokens_apart"),
        ("llama", "tokens_alone"),
        ("mixtral", "experts"),
        ("mixtral", "experts_before_0_19"),
        ("mixtral", "experts_legacy"),
        ("qwen3_moe", "experts_down"),
    ] {
        let (model, _) = with(family, variant);
        let folder = read_adapter(&adapter(family, variant)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        write_adapter(dir.path(), &folder.config, &model.adapter_modules().unwrap()).unwrap();
        let again = read_adapter(dir.path()).unwrap();
        assert_eq!(again.modules.keys().collect::<Vec<_>>(), folder.modules.keys().collect::<Vec<_>>());
        for (path, module) in &folder.modules {
            let same = |a: &Tensor, b: &Tensor| assert!(a.equal(b), "{family}/{variant} {path}");
            match (module, &again.modules[path]) {
                (AdapterModule::Tokens(a), AdapterModule::Tokens(b)) => same(a, b),
                (AdapterModule::Stacked(a), AdapterModule::Stacked(b))
                | (AdapterModule::Linear(a), AdapterModule::Linear(b)) => {
                    same(&a.a, &b.a);
                    same(&a.b, &b.b);
                }
                other => panic!("{other:?}"),
            }
        }
        // Names and tensors are PEFT's own, but for the layout of before 0.19, which becomes today's.
        let of = if variant == "experts_before_0_19" { "experts" } else { variant };
        let file = |dir: &std::path::Path| TensorFile::open(&dir.join("adapter_model.safetensors")).unwrap();
        let (ours, theirs) = (file(dir.path()), file(&adapter(family, of)));
        assert_eq!(ours.names().collect::<Vec<_>>(), theirs.names().collect::<Vec<_>>(), "{family}/{variant}");
        for name in ours.names() {
            assert!(ours.read(name).unwrap().equal(&theirs.read(name).unwrap()), "{family}/{variant} {name}");
        }
    }
}

#[test]
fn a_layout_that_the_version_does_not_tell_is_known_by_its_shapes() {
    let (model, batch) = with("mixtral", "experts");
    let wanted = logits(&model, &batch);
    let dir = tempfile::tempdir().unwrap();
    let source = adapter("mixtral", "experts_before_0_19");
    std::fs::copy(source.join("adapter_model.safetensors"), dir.path().join("adapter_model.safetensors")).unwrap();
    let config = std::fs::read_to_string(source.join("adapter_config.json")).unwrap();
    assert!(config.contains("0.18.1"));
    std::fs::write(dir.path().join("adapter_config.json"), config.replace("0.18.1", "0.19.0.dev0")).unwrap();
    let mut other = load(&fixtures().join("mixtral"));
    let folder = read_adapter(dir.path()).unwrap();
    check_adapter(&other.config, &folder).unwrap();
    other.load_adapter(&folder).unwrap();
    assert!(logits(&other, &batch).equal(&wanted));
}

#[test]
fn several_at_run_time() {
    // Two adapters of experts as one: the sum of their updates, each with its weight.
    let mut model = load(&fixtures().join("mixtral"));
    let batch = batch_of(&model, "mixtral");
    let base = logits(&model, &batch);
    let mut set = AdapterSet::default();
    for (name, variant) in [("a", "experts"), ("b", "experts_down")] {
        set.load(name, &read_adapter(&adapter("mixtral", variant)).unwrap(), &mut model).unwrap();
    }
    for (name, variant) in [("a", "experts"), ("b", "experts_down")] {
        set.activate(&mut model, &[(name, 1.0)]).unwrap();
        let (alone, _) = with("mixtral", variant);
        assert!(distance(&logits(&model, &batch), &logits(&alone, &batch)) < SAME);
    }
    set.activate(&mut model, &[("a", 0.5), ("b", -2.0)]).unwrap();
    let path = stacks(&model.config)[1].path.clone();
    let got = model.merged_expert(&path, 2).unwrap();
    let delta = |variant: &str| {
        let (m, _) = with("mixtral", variant);
        m.stacked().into_iter().find(|(p, _)| *p == path).unwrap().1.delta_of(2, Kind::Double).unwrap()
    };
    let bare = load(&fixtures().join("mixtral")).merged_expert(&path, 2).unwrap();
    let wanted = bare + delta("experts") * 0.5 - delta("experts_down") * 2.0;
    assert!(distance(&got, &wanted) < SAME);
    let refused = set.route(&mut model, &batch.segments, &[&[("a", 1.0)], &[]]).unwrap_err();
    assert!(refused.to_string().contains("target_parameters"), "{refused}");
    set.activate(&mut model, &[]).unwrap();
    assert!(logits(&model, &batch).equal(&base));

    // Rows of tokens: beside other adapters with a weight of 1, and not over each other.
    let mut model = load(&fixtures().join("qwen2"));
    let batch = batch_of(&model, "qwen2");
    let base = logits(&model, &batch);
    for (name, variant) in [("rows", "tokens"), ("same", "tokens_alone"), ("plain", "lora")] {
        set = if name == "rows" { AdapterSet::default() } else { set };
        set.load(name, &read_adapter(&adapter("qwen2", variant)).unwrap(), &mut model).unwrap();
    }
    set.activate(&mut model, &[("rows", 1.0)]).unwrap();
    let (alone, _) = with("qwen2", "tokens");
    assert!(distance(&logits(&model, &batch), &logits(&alone, &batch)) < SAME);
    set.activate(&mut model, &[("same", 1.0), ("plain", 0.5)]).unwrap();
    assert!(distance(&logits(&model, &batch), &base) > SAME);
    for (mix, word) in [(vec![("rows", 0.5)], "cannot be weighted"), (vec![("rows", 1.0), ("same", 1.0)], "named once")]
    {
        let refused = set.activate(&mut model, &mix).unwrap_err();
        assert!(refused.to_string().contains(word), "{refused}");
    }
    set.activate(&mut model, &[]).unwrap();
    assert!(logits(&model, &batch).equal(&base));
}

fn plan(family: &str, change: impl FnOnce(&mut AdapterConfig)) -> Result<InjectionPlan, Error> {
    let model = ModelConfig::read(&fixtures().join(family)).unwrap();
    let mut config = AdapterConfig {
        r: 4,
        target_modules: Some(TargetModules::List(vec!["q_proj".into()])),
        ..AdapterConfig::default()
    };
    change(&mut config);
    plan_injection(&model, &config)
}

#[test]
fn fresh_adapters_change_nothing_and_count_as_they_are_planned() {
    for (family, parameters, tokens) in [
        ("mixtral", STACKED.map(|p| format!("experts.{p}")).to_vec(), None),
        ("qwen3_moe", vec!["down_proj".to_string()], None),
        ("llama", Vec::new(), Some(TokenIndices::Embedding(vec![5, 22]))),
        ("qwen2", Vec::new(), Some(TokenIndices::Embedding(vec![5, 22]))),
    ] {
        let mut model = load(&fixtures().join(family));
        let batch = batch_of(&model, family);
        let before = logits(&model, &batch);
        let plan = plan(family, |c| {
            c.target_parameters = (!parameters.is_empty()).then_some(parameters);
            c.trainable_token_indices = tokens;
        })
        .unwrap();
        model.inject(&plan, 3).unwrap();
        assert!(distance(&logits(&model, &batch), &before) < SAME, "{family}");
        let trained: i64 = model.parameters().iter().map(|p| p.tensor.numel() as i64).sum();
        assert_eq!(trained, plan.trained(), "{family}");
        let saved: i64 = model.adapter_modules().unwrap().values().map(AdapterModule::trained).sum();
        assert_eq!(trained, saved, "{family}");
        let _loss = model.loss_and_backward(&batch, 0, 1.0, false).unwrap();
        let silent: Vec<String> = model
            .parameters()
            .into_iter()
            .filter(|p| !p.name.contains("lora_A") && p.tensor.grad().norm().double_value(&[]) == 0.0)
            .map(|p| p.name)
            .collect();
        assert!(silent.is_empty(), "{family}: no gradient for {silent:?}");
    }
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    type Change = Box<dyn FnOnce(&mut AdapterConfig)>;
    let experts = |c: &mut AdapterConfig| c.target_parameters = Some(vec!["experts.down_proj".into()]);
    let tokens = |indices: TokenIndices| move |c: &mut AdapterConfig| c.trainable_token_indices = Some(indices);
    let list = |ids: &[i64]| TokenIndices::Embedding(ids.to_vec());
    let map = |entries: &[(&str, &[i64])]| {
        TokenIndices::ByModule(entries.iter().map(|(k, v)| ((*k).to_string(), v.to_vec())).collect())
    };
    let cases: Vec<(&str, Change, &[&str])> = vec![
        ("llama", Box::new(tokens(list(&[5, 320]))), &["trainable_token_indices", "320"]),
        ("llama", Box::new(tokens(map(&[("embed", &[5])]))), &["trainable_token_indices", "embed_tokens", "lm_head"]),
        (
            "llama",
            Box::new(move |c| {
                tokens(TokenIndices::Embedding(vec![5]))(c);
                c.modules_to_save = Some(vec!["embed_tokens".into()]);
            }),
            &["model.embed_tokens", "saved in full"],
        ),
        (
            "qwen2",
            Box::new(move |c| {
                tokens(TokenIndices::Embedding(vec![5]))(c);
                c.target_modules = Some(TargetModules::List(vec!["lm_head".into()]));
            }),
            &["lm_head"],
        ),
        (
            "qwen2",
            Box::new(|c| {
                c.trainable_token_indices =
                    Some(TokenIndices::ByModule(vec![("embed_tokens".into(), vec![5]), ("lm_head".into(), vec![6])]));
                c.ensure_weight_tying = true;
            }),
            &["ensure_weight_tying", "same tokens"],
        ),
        ("llama", Box::new(experts), &["target_parameters", "llama"]),
        ("mixtral", Box::new(|c| c.target_parameters = Some(vec!["experts.w1".into()])), &["experts.down_proj"]),
        ("mixtral", Box::new(|c| c.target_parameters = Some(vec!["gate.weight".into()])), &["target_modules"]),
        (
            "mixtral",
            Box::new(move |c| {
                experts(c);
                c.lora_dropout = 0.1;
            }),
            &["lora_dropout", "target_parameters"],
        ),
        (
            "mixtral",
            Box::new(move |c| {
                experts(c);
                c.use_dora = true;
            }),
            &["use_dora", "target_parameters"],
        ),
        (
            "mixtral",
            Box::new(move |c| {
                experts(c);
                c.lora_bias = true;
            }),
            &["lora_bias", "target_parameters"],
        ),
        (
            "mixtral",
            Box::new(move |c| {
                experts(c);
                c.target_modules = Some(TargetModules::List(vec!["q_proj".into(), "w1".into()]));
            }),
            &["exclude each other"],
        ),
        (
            "mixtral",
            Box::new(move |c| {
                experts(c);
                c.r = 33;
            }),
            &["experts.down_proj"],
        ),
    ];
    for (family, change, words) in cases {
        let error = plan(family, change).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{family}: no `{word}` in `{error}`");
        }
    }
}

#[test]
fn an_adapter_of_another_model_is_refused_before_its_weights_are_read() {
    let model = |family: &str| ModelConfig::read(&fixtures().join(family)).unwrap();
    let refused = |family: &str, folder: &AdapterFolder| check_adapter(&model(family), folder).unwrap_err().to_string();
    let experts = read_adapter(&adapter("mixtral", "experts")).unwrap();
    assert!(refused("qwen3_moe", &experts).contains("down_proj"));
    assert!(refused("llama", &experts).contains("experts"));
    let mut tokens = read_adapter(&adapter("llama", "tokens")).unwrap();
    check_adapter(&model("qwen2"), &tokens).unwrap();
    tokens.config.trainable_token_indices = Some(TokenIndices::Embedding(vec![22, 5, 85, 320]));
    assert!(refused("llama", &tokens).contains("320"));
    tokens.modules.remove("model.embed_tokens");
    tokens.config.trainable_token_indices = Some(TokenIndices::Embedding(vec![22]));
    assert!(refused("llama", &tokens).contains("no rows"));
}
