//! How a frozen base is divided among processes, and what of a run cannot be: found before a weight is read.

use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::plan::Trained;
use lora_format::{AdapterModule, Method};
use lora_model::{ModelConfig, Stage};

/// The stages of a run, one for each process; the whole model where it is not divided.
///
/// # Errors
/// [`Error::Stages`] for more stages than there are blocks, for a stage without an adapter, and for an adapter that is not
/// trained in stages.
pub(crate) fn stages_of(config: &RunConfig, model: &ModelConfig, trained: &Trained) -> Result<Vec<Stage>> {
    let stages = config.train.pipeline_stages;
    if stages < 2 {
        return Ok(vec![Stage::whole(model)]);
    }
    let refuse = |adapter, reason| Err(Error::Stages { stages, adapter, reason });
    let blocks = model.windows.len();
    if stages as usize > blocks {
        let reason = format!("this model has {blocks} blocks, and a stage has one at least; set at most {blocks}");
        return refuse(None, reason);
    }
    let list = Stage::split(model, stages as usize)?;
    let adapted: Vec<&str> = match trained {
        Trained::Fresh(plan) => plan.adapters.iter().map(|adapter| adapter.module.path.as_str()).collect(),
        Trained::Existing(folder) => {
            let adapter = config.lora.init_adapter.clone();
            if !matches!(folder.config.method, Method::Lora) {
                return refuse(adapter, "only LoRA is trained in stages; give such an adapter".into());
            }
            let odd = folder.modules.iter().find(|(_, content)| match content {
                AdapterModule::Linear(lora) | AdapterModule::Embedding(lora) => {
                    // The other end of a tied table would keep the old one.
                    lora.base_weight.is_some() && model.tie_word_embeddings
                }
                _ => true,
            });
            if let Some((path, _)) = odd {
                let reason = format!(
                    "it has more for module `{path}` than two small matrices, which is not trained in stages; train it in one process"
                );
                return refuse(adapter, reason);
            }
            folder.modules.keys().map(String::as_str).collect()
        }
        Trained::Everything => Vec::new(),
    };
    let idle = |stage: &&Stage| !adapted.iter().any(|path| stage.holds(model, path));
    if let Some((rank, stage)) = list.iter().enumerate().find(|(_, stage)| idle(stage)) {
        let held = stage.blocks();
        let (first, last) = (held.start, held.end.saturating_sub(1));
        let reason = format!(
            "rank {rank} would hold blocks {first} to {last}, where nothing is trained; let lora.target_modules and \
             lora.layers_to_transform name layers of every stage, or set fewer stages"
        );
        return refuse(None, reason);
    }
    Ok(list)
}
