//! Which files of a model's repository are needed: its configuration, its tokenizer, and its weights once.

/// Vocabularies and merges that are plain text.
const TEXTS: [&str; 2] = ["vocab.txt", "merges.txt"];
/// What a run of another program left behind.
const LEFT_BEHIND: [&str; 4] = ["trainer_state.json", "training_args.json", "optimizer.json", "scheduler.json"];

/// The files of a model or an adapter, by the names of all that its repository has. Weights are taken once, from
/// `model.safetensors` or the shards of its index: never what would have to be unpickled or run, and no second copy of them in
/// another layout.
pub fn model_files(names: &[&str]) -> Vec<String> {
    let single = names.contains(&"model.safetensors");
    let wanted = |name: &str| {
        if let Some(template) = name.strip_prefix("additional_chat_templates/") {
            return !template.contains('/') && template.ends_with(".jinja");
        }
        if name.contains('/') || name.starts_with('.') || LEFT_BEHIND.contains(&name) {
            return false;
        }
        match name.rsplit_once('.').map(|(_, extension)| extension) {
            Some("safetensors") if name.starts_with("adapter_model") => true,
            Some("safetensors") if single => name == "model.safetensors",
            Some("safetensors") => name.contains("-of-") && !name.starts_with("consolidated"),
            Some("json") if name.ends_with(".safetensors.index.json") => !single && name.starts_with("model."),
            Some("json") => !name.ends_with(".index.json"),
            Some("jinja" | "model") => true,
            Some("txt") => TEXTS.contains(&name),
            _ => false,
        }
    };
    let files: Vec<String> = names.iter().filter(|name| wanted(name)).map(|name| (*name).to_owned()).collect();
    // Settings without weights are no model, and an adapter has its own.
    if files.iter().any(|name| name.ends_with(".safetensors")) { files } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_taken_once_and_code_never() {
        let of = |names: &[&str]| model_files(names).join(" ");
        assert_eq!(
            of(&[
                ".gitattributes",
                "README.md",
                "config.json",
                "consolidated.safetensors",
                "model.safetensors",
                "model.fp16.safetensors",
                "pytorch_model.bin",
                "pytorch_model.bin.index.json",
                "modeling_x.py",
                "tokenizer.json",
                "merges.txt",
                "onnx/model.onnx",
                "chat_template.jinja",
                "additional_chat_templates/rag.jinja",
                "optimizer.pt",
                "LICENSE.txt",
                "tokenizer.model",
            ]),
            "config.json model.safetensors tokenizer.json merges.txt chat_template.jinja additional_chat_templates/rag.jinja tokenizer.model"
        );
        assert_eq!(
            of(&[
                "config.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json"
            ]),
            "config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json"
        );
        assert_eq!(
            of(&["adapter_config.json", "adapter_model.safetensors"]),
            "adapter_config.json adapter_model.safetensors"
        );
        assert_eq!(of(&["config.json", "pytorch_model.bin"]), "");
    }
}
