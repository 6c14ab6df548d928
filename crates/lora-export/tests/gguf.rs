//! GGUF files read back by a reader of the tests' own: names, shapes, transforms, scales. Whether llama.cpp computes the same
//! with them is checked by `cargo xtask interop --gguf`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{fixtures, temp};
use lora_core::{LoraSpec, delta};
use lora_export::{Error, GgufFileType, MergeOptions, export_gguf, export_gguf_lora, merge};
use lora_format::{AdapterModule, Checkpoint, GgufType, LoraTensors, read_adapter};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// A product of up to 4 ranks in fp32, in two orders.
const SUM_TOLERANCE: f64 = 1e-6;

const F32: GgufFileType = GgufFileType::Plain(GgufType::F32);
const F16: GgufFileType = GgufFileType::Plain(GgufType::F16);
const BF16: GgufFileType = GgufFileType::Plain(GgufType::BF16);
const Q8_0: GgufFileType = GgufFileType::Plain(GgufType::Q8_0);
const Q4_0: GgufFileType = GgufFileType::Plain(GgufType::Q4_0);

/// A file as it was read: texts and numbers of the metadata, and float32 tensors, rows first.
struct Read {
    texts: BTreeMap<String, String>,
    tensors: BTreeMap<String, (Vec<i64>, u32, Vec<u8>)>,
}

struct Bytes<'a>(&'a [u8], usize);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let at = self.1;
        self.1 += N;
        self.0[at..at + N].try_into().unwrap()
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }
    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
    fn text(&mut self) -> String {
        let (n, at) = (self.u64() as usize, self.1);
        self.1 += n;
        String::from_utf8(self.0[at..at + n].to_vec()).unwrap()
    }
    fn value(&mut self, kind: u32) -> String {
        match kind {
            4 => self.u32().to_string(),
            5 => i32::from_le_bytes(self.take()).to_string(),
            6 => f32::from_le_bytes(self.take()).to_string(),
            7 => (self.take::<1>()[0] != 0).to_string(),
            8 => self.text(),
            9 => {
                let (of, n) = (self.u32(), self.u64());
                let all: Vec<String> = (0..n).map(|_| self.value(of)).collect();
                format!("{} values", all.len())
            }
            other => panic!("type {other}"),
        }
    }
}

fn read(path: &Path) -> Read {
    let file = std::fs::read(path).unwrap();
    let mut b = Bytes(&file, 0);
    assert_eq!((b.take(), b.u32()), (*b"GGUF", 3));
    let (tensors, values) = (b.u64(), b.u64());
    let mut texts = BTreeMap::new();
    for _ in 0..values {
        let key = b.text();
        let kind = b.u32();
        texts.insert(key, b.value(kind));
    }
    let mut infos = Vec::new();
    for _ in 0..tensors {
        let name = b.text();
        let n = b.u32();
        let mut shape: Vec<i64> = (0..n).map(|_| b.u64() as i64).collect();
        shape.reverse();
        infos.push((name, shape, b.u32(), b.u64() as usize));
    }
    let data = b.1.next_multiple_of(32);
    let bytes = |shape: &[i64], kind: u32| {
        let n = shape.iter().product::<i64>() as usize;
        match kind {
            0 => 4 * n,
            1 | 30 => 2 * n,
            8 => n / 32 * 34,
            2 => n / 32 * 18,
            6 => n / 32 * 22,
            other => panic!("type {other}"),
        }
    };
    let tensors = infos
        .into_iter()
        .map(|(name, shape, kind, offset)| {
            let at = data + offset;
            assert_eq!(at % 32, 0, "{name}");
            let part = file[at..at + bytes(&shape, kind)].to_vec();
            (name, (shape, kind, part))
        })
        .collect();
    Read { texts, tensors }
}

impl Read {
    fn f32(&self, name: &str) -> Tensor {
        let (shape, kind, bytes) = &self.tensors[name];
        assert_eq!(*kind, 0, "{name}");
        let values: Vec<f32> = bytes.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect();
        Tensor::from_slice(&values).view(shape.as_slice())
    }
}

fn exported(base: &Path, adapters: &[PathBuf], kind: GgufFileType) -> Read {
    let dir = temp();
    let path = dir.path().join("x.gguf");
    let mut heard = Vec::new();
    let report = export_gguf(base, adapters, &path, kind, &mut |done, of| heard.push((done, of))).unwrap();
    assert_eq!(heard.last(), Some(&(report.bytes, report.bytes)));
    let read = read(&path);
    assert_eq!(read.tensors.len(), report.tensors);
    read
}

/// Rows of each head from halves to pairs, one by one.
fn paired(t: &Tensor, heads: i64) -> Tensor {
    let d = t.size()[0] / heads;
    let row = |i: i64| (i / d) * d + (i % d % 2) * (d / 2) + i % d / 2;
    t.index_select(0, &Tensor::from_slice(&(0..t.size()[0]).map(row).collect::<Vec<_>>()))
}

#[test]
fn a_llama_is_turned_as_llama_cpp_rotates_it_and_all_else_is_kept() {
    let base = fixtures().join("llama");
    let got = exported(&base, &[], F32);
    let c = Checkpoint::open(&base).unwrap();
    let of = |name: &str| c.read(name).unwrap();
    for (gguf, wanted) in [
        ("token_embd.weight", of("model.embed_tokens.weight")),
        ("output.weight", of("lm_head.weight")),
        ("blk.1.attn_q.weight", paired(&of("model.layers.1.self_attn.q_proj.weight"), 4)),
        ("blk.0.attn_k.weight", paired(&of("model.layers.0.self_attn.k_proj.weight"), 2)),
        ("blk.0.attn_v.weight", of("model.layers.0.self_attn.v_proj.weight")),
        ("blk.1.ffn_norm.weight", of("model.layers.1.post_attention_layernorm.weight")),
        ("blk.1.ffn_down.weight", of("model.layers.1.mlp.down_proj.weight")),
    ] {
        assert!(got.f32(gguf).equal(&wanted), "{gguf}");
    }
    for (key, value) in [
        ("general.architecture", "llama"),
        ("llama.block_count", "2"),
        ("llama.attention.head_count_kv", "2"),
        ("llama.rope.dimension_count", "8"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "gpt-2"),
        ("tokenizer.ggml.tokens", "320 values"),
        ("tokenizer.ggml.bos_token_id", "1"),
        ("tokenizer.ggml.eos_token_id", "4"),
    ] {
        assert_eq!(got.texts.get(key).map(String::as_str), Some(value), "{key}");
    }
    let template = std::fs::read_to_string(base.join("chat_template.jinja")).unwrap();
    assert_eq!(got.texts["tokenizer.chat_template"], template);
}

#[test]
fn other_families_are_stored_as_llama_cpp_reads_them() {
    let keep = temp();
    let gemma = keep.path().join("gemma");
    std::fs::create_dir(&gemma).unwrap();
    for file in ["model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixtures().join("gemma2").join(file), gemma.join(file)).unwrap();
    }
    let config = std::fs::read_to_string(fixtures().join("gemma2/config.json")).unwrap();
    std::fs::write(
        gemma.join("config.json"),
        config.replace("\"query_pre_attn_scalar\": 256", "\"query_pre_attn_scalar\": 16"),
    )
    .unwrap();
    let (got, c) = (exported(&gemma, &[], F32), Checkpoint::open(&gemma).unwrap());
    let norm = c.read("model.layers.0.pre_feedforward_layernorm.weight").unwrap() + 1.0;
    assert!(got.f32("blk.0.ffn_norm.weight").equal(&norm));
    assert!(!got.tensors.contains_key("output.weight"), "a tied head is the embedding");
    let gpt2 = fixtures().join("gpt2");
    let (got, c) = (exported(&gpt2, &[], F16), Checkpoint::open(&gpt2).unwrap());
    assert_eq!(got.tensors["blk.0.attn_qkv.weight"].0, [96, 32]);
    assert!(got.f32("blk.0.attn_qkv.bias").equal(&c.read("transformer.h.0.attn.c_attn.bias").unwrap()));
    assert!(got.f32("position_embd.weight").equal(&c.read("transformer.wpe.weight").unwrap()));
    let rope3 = exported(&fixtures().join("llama_tied_rope3"), &[], F32);
    assert_eq!(rope3.tensors["rope_freqs.weight"].0, [4]);
}

#[test]
fn adapters_are_merged_on_the_way_as_merge_does_it() {
    for (family, variant) in
        [("llama", "all_linear"), ("llama", "dora"), ("llama", "head_saved"), ("qwen2", "lora_bias")]
    {
        let base = fixtures().join(family);
        let adapter = base.join("adapters").join(variant);
        let dir = temp();
        let merged = dir.path().join("merged");
        merge(&base, std::slice::from_ref(&adapter), &merged, &MergeOptions::default(), &mut |_, _| {}).unwrap();
        let (one, two) = (exported(&base, &[adapter], F32), exported(&merged, &[], F32));
        assert!(one.tensors == two.tensors, "{family}/{variant}");
    }
}

#[test]
fn types_are_those_asked_for_where_rows_allow_it() {
    let base = fixtures().join("llama");
    let kinds =
        |kind| exported(&base, &[], kind).tensors.into_iter().map(|(n, (_, k, _))| (n, k)).collect::<BTreeMap<_, _>>();
    let (q8, q4, bf16) = (kinds(Q8_0), kinds(Q4_0), kinds(BF16));
    // Rows of 32 fit, those of 80 do not.
    assert_eq!((q8["blk.0.attn_q.weight"], q8["blk.0.ffn_down.weight"], q8["output_norm.weight"]), (8, 1, 0));
    assert_eq!((q4["blk.0.attn_q.weight"], q4["token_embd.weight"], q4["output.weight"]), (2, 8, 8));
    assert_eq!((bf16["blk.0.ffn_down.weight"], bf16["blk.0.attn_norm.weight"]), (30, 0));
}

#[test]
fn a_mixture_falls_back_as_llama_cpp_does_and_says_so() {
    let dir = temp();
    let path = dir.path().join("x.gguf");
    let base = fixtures().join("llama");
    let report = export_gguf(&base, &[], &path, GgufFileType::Q4KM, &mut |_, _| {}).unwrap();
    let of = |name: &str| report.fallbacks.iter().find(|f| f.tensor == name).map(|f| (f.wanted, f.stored));
    // Rows of 32 have no block of 256, those of 80 none of 32.
    assert_eq!(of("blk.0.attn_q.weight"), Some((GgufType::Q4K, GgufType::Q5_0)));
    assert_eq!(of("output.weight"), Some((GgufType::Q6K, GgufType::Q8_0)));
    assert_eq!(of("blk.1.ffn_down.weight"), Some((GgufType::Q6K, GgufType::F16)));
    assert_eq!(of("output_norm.weight"), None);
    let read = read(&path);
    assert_eq!((read.tensors["blk.0.attn_q.weight"].1, read.texts["general.file_type"].as_str()), (6, "15"));
    assert_eq!(report.types.values().sum::<usize>(), report.tensors);
}

#[test]
fn experts_lie_in_one_tensor_in_their_order() {
    let base = fixtures().join("mixtral");
    let (got, c) = (exported(&base, &[], F32), Checkpoint::open(&base).unwrap());
    for (gguf, part) in [("ffn_gate_exps", "w1"), ("ffn_up_exps", "w3"), ("ffn_down_exps", "w2")] {
        let of = |e: i64| c.read(&format!("model.layers.1.block_sparse_moe.experts.{e}.{part}.weight")).unwrap();
        let wanted = Tensor::stack(&[of(0), of(1), of(2), of(3)], 0);
        assert!(got.f32(&format!("blk.1.{gguf}.weight")).equal(&wanted), "{gguf}");
    }
    let half = exported(&base, &[], F16);
    assert_eq!((half.tensors["blk.0.ffn_gate_inp.weight"].1, half.tensors["blk.0.ffn_up_exps.weight"].1), (0, 1));
    assert_eq!((got.texts["llama.expert_count"].as_str(), got.texts["llama.expert_used_count"].as_str()), ("4", "2"));
}

#[test]
fn heads_of_a_neox_are_parted_into_queries_keys_and_values() {
    let base = fixtures().join("gpt_neox");
    let (got, c) = (exported(&base, &[], F32), Checkpoint::open(&base).unwrap());
    let stored = c.read("gpt_neox.layers.0.attention.query_key_value.weight").unwrap();
    // Head h of four has its query in rows 24 h.., its key 8 rows on, its value 16.
    let rows: Vec<i64> = (0..96).map(|i| i % 32 / 8 * 24 + i / 32 * 8 + i % 8).collect();
    let wanted = stored.index_select(0, &Tensor::from_slice(&rows));
    assert!(got.f32("blk.0.attn_qkv.weight").equal(&wanted));
    assert_eq!(got.texts["gptneox.rope.dimension_count"], "2");
}

#[test]
fn a_window_that_llama_cpp_lacks_ends_the_context_and_granite_keeps_its_scales() {
    let dir = temp();
    let path = dir.path().join("x.gguf");
    let report = export_gguf(&fixtures().join("mistral"), &[], &path, F16, &mut |_, _| {}).unwrap();
    assert_eq!(read(&path).texts["llama.context_length"], "8");
    assert!(report.notes[0].contains("8 tokens"), "{:?}", report.notes);
    let granite = exported(&fixtures().join("granite"), &[], F32).texts;
    let of = |key: &str| granite[&format!("granite.{key}")].as_str();
    assert_eq!((of("attention.scale"), of("embedding_scale")), ("0.2", "2"));
    assert_eq!((of("residual_scale"), of("logit_scale")), ("0.5", "4"));
}

#[test]
fn an_adapter_keeps_its_change_whatever_its_ranks_and_scales() {
    let base = fixtures().join("llama");
    for variant in ["lora", "rslora", "patterns", "all_linear"] {
        let dir = base.join("adapters").join(variant);
        let out = temp();
        let path = out.path().join("a.gguf");
        export_gguf_lora(&base, &dir, &path, GgufType::F32).unwrap();
        let (got, folder) = (read(&path), read_adapter(&dir).unwrap());
        assert_eq!(got.texts["general.type"], "adapter");
        let alpha: f64 = got.texts["adapter.lora.alpha"].parse().unwrap();
        for (module, content) in &folder.modules {
            let AdapterModule::Linear(LoraTensors { a, b, .. }) = content else { panic!("{module}") };
            let c = &folder.config;
            let spec = LoraSpec::new(c.rank_of(module).unwrap(), c.alpha_of(module).unwrap(), c.use_rslora).unwrap();
            let mut wanted = delta(a, b, spec.scale(), Kind::Float).unwrap();
            let number = module.split('.').nth(2).unwrap();
            let part = module.rsplit('.').next().unwrap();
            let (name, heads) = match part {
                "q_proj" => ("attn_q", 4),
                "k_proj" => ("attn_k", 2),
                "v_proj" => ("attn_v", 0),
                "o_proj" => ("attn_output", 0),
                "gate_proj" => ("ffn_gate", 0),
                "up_proj" => ("ffn_up", 0),
                _ => ("ffn_down", 0),
            };
            if heads > 0 {
                wanted = paired(&wanted, heads);
            }
            let of = |end: &str| got.f32(&format!("blk.{number}.{name}.weight.{end}"));
            // llama.cpp scales by alpha over the rank that it finds.
            let made = of("lora_b").matmul(&of("lora_a")) * (alpha / of("lora_b").size()[1] as f64);
            let d = (&made - &wanted).abs().max().double_value(&[]) / wanted.abs().max().double_value(&[]);
            assert!(d < SUM_TOLERANCE, "{variant} {module}: {d:e}");
        }
    }
}

#[test]
fn what_llama_cpp_would_compute_otherwise_is_refused_and_nothing_is_left() {
    let refusal = |base: &Path, adapter: Option<&Path>| {
        let dir = temp();
        let path = dir.path().join("x.gguf");
        let error = match adapter {
            None => export_gguf(base, &[], &path, F16, &mut |_, _| {}).unwrap_err(),
            Some(adapter) => export_gguf_lora(base, adapter, &path, GgufType::F32).unwrap_err(),
        };
        assert!(matches!(error, Error::Gguf { .. }), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        error.to_string()
    };
    assert!(refusal(&fixtures().join("qwen3_moe"), None).contains("decoder_sparse_step"));
    assert!(refusal(&fixtures().join("gemma2"), None).contains("query_pre_attn_scalar"));
    assert!(refusal(&fixtures().join("gemma3"), None).contains("query_pre_attn_scalar"));
    assert!(refusal(&fixtures().join("llama_longrope"), None).contains("longrope"));
    let llama = fixtures().join("llama");
    for variant in ["dora", "lora_bias", "head_saved", "pissa", "loftq", "embedding"] {
        assert!(refusal(&llama, Some(&llama.join("adapters").join(variant))).contains("merge it"), "{variant}");
    }
}
