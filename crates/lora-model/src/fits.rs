//! Whether an adapter belongs to a model, told from its config before any weight is read.

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::names::modules;
use crate::stacked::stacks;
use crate::tokens::check_tokens;
use lora_format::{AdaLoraTensors, AdapterFolder, AdapterModule, LoraTensors, VeraTensors};

/// Checks that every module, parameter and token of an adapter is in the model, and of its shape.
///
/// # Errors
/// [`Error::Module`] with the first that is not; [`Error::Adapter`] for a token outside the vocabulary.
pub fn check_adapter(config: &ModelConfig, folder: &AdapterFolder) -> Result<()> {
    let (known, stacks) = (modules(config), stacks(config));
    for (path, module) in &folder.modules {
        let wrong = |reason: String| Error::Module { module: path.clone(), reason };
        let absent = || wrong("is not in the base model; the adapter belongs to another one".into());
        if let AdapterModule::Stacked(lora) = module {
            let stack = stacks.iter().find(|s| s.path == *path).ok_or_else(absent)?;
            let _pair = stack.fit(lora, folder.config.rank_of(path)?)?;
            continue;
        }
        let spec = known.iter().find(|m| m.path == *path).ok_or_else(absent)?;
        let given = match module {
            AdapterModule::Linear(LoraTensors { a, b, .. })
            | AdapterModule::Embedding(LoraTensors { a, b, .. })
            | AdapterModule::AdaLora(AdaLoraTensors { a, b, .. }) => [a.size()[1], b.size()[0]],
            // Its files do not say how wide the input is.
            AdapterModule::Vera(VeraTensors { lambda_b, .. }) => [spec.in_features, lambda_b.size()[0]],
            AdapterModule::Saved { .. } | AdapterModule::Tokens(_) | AdapterModule::Stacked(_) => continue,
        };
        let wanted = [spec.in_features, spec.out_features];
        if given != wanted {
            let ([i, o], [wi, wo]) = (given, wanted);
            return Err(wrong(format!("goes from {i} to {o} in the adapter and from {wi} to {wo} in the base model")));
        }
    }
    check_tokens(config, folder).map(|_| ())
}
