//! Reads an adapter folder and writes it again.
#![allow(clippy::print_stdout)]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    if args.len() == 2 {
        println!("{:#?}", {
            let mut c = lora_format::read_hf_config(args[1].as_ref())?;
            c.raw.clear();
            c
        });
        return Ok(());
    }
    let a = lora_format::read_adapter(args[1].as_ref())?;
    lora_format::write_adapter(args[2].as_ref(), &a.config, &a.modules)?;
    Ok(())
}
