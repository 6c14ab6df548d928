//! `layout`: whether classes of libtorch that are compiled through stubs of other headers are as large as libtorch itself takes them to be
//! (docs/adr/0002-stub-headers-of-gloo.md).

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::cargo::{Workspace, capture, first_line};
use crate::setup;

/// The class, as its name stands in symbols.
const CLASS: &str = "16ProcessGroupGloo";
/// A member of it that makes another one.
const MAKER: &str = "_ZN4c10d16ProcessGroupGloo5split";
/// What the compiler is asked.
const SOURCE: &str = "#define USE_C10D_GLOO\n\
    #include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>\n\
    extern \"C\" const unsigned long lora_size_of_class = sizeof(c10d::ProcessGroupGloo);\n";

/// Compares the size that our compiler sees with the argument of `operator new` in libtorch's own code.
pub fn run(ws: &Workspace) -> Result<()> {
    setup::ensure(ws)?;
    if std::env::consts::ARCH != "x86_64" {
        println!("layout: not compared: instructions are read of x86_64 alone");
        return Ok(());
    }
    ensure!(
        first_line("objdump", &["--version"]).is_some(),
        "objdump does not run, and the layout of ProcessGroupGloo is compared with its help; install binutils (Debian, \
         Ubuntu: apt-get install binutils)"
    );
    let library = ws.libtorch().join("lib/libtorch_cpu.so");
    let Some(code) = code_of(&library, MAKER)? else {
        println!("layout: {} has no ProcessGroupGloo; several processes are refused with it", library.display());
        return Ok(());
    };
    let taken = taken_for(&code, CLASS).with_context(|| {
        format!("`{MAKER}` of {} makes no ProcessGroupGloo in a way that is known", library.display())
    })?;
    let seen = seen_by_compiler(ws)?;
    ensure!(
        seen == taken,
        "ProcessGroupGloo has {seen} bytes through the stubs of gloo's headers and {taken} in {}: look at its header, and at \
         crates/lora-torch/shim/stub, before the assertion in shim/distributed.cpp is changed",
        library.display()
    );
    println!("layout: ProcessGroupGloo has {seen} bytes, as in libtorch's own code");
    Ok(())
}

/// The instructions of the first exported function whose symbol begins so; nothing where there is none.
fn code_of(library: &Path, symbol: &str) -> Result<Option<String>> {
    let table = capture(Command::new("objdump").arg("-T").arg(library))?;
    let Some((start, length)) = table.lines().find_map(|line| place(line, symbol)) else { return Ok(None) };
    let bounds = [format!("--start-address={start:#x}"), format!("--stop-address={:#x}", start + length)];
    Ok(Some(capture(Command::new("objdump").args(["-d", "--no-show-raw-insn"]).args(bounds).arg(library))?))
}

/// Address and length of a line of the table of symbols.
fn place(line: &str, symbol: &str) -> Option<(u64, u64)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    words.last()?.starts_with(symbol).then_some(())?;
    let section = words.iter().position(|word| *word == ".text")?;
    let number = |word: &&str| u64::from_str_radix(word, 16).ok();
    Some((words.first().and_then(number)?, words.get(section + 1).and_then(number)?))
}

/// The bytes that were asked of `operator new` last before a constructor of the class was called.
fn taken_for(code: &str, class: &str) -> Option<u64> {
    let (mut argument, mut taken) = (None, None);
    for line in code.lines() {
        if let Some((_, rest)) = line.split_once("mov    $0x")
            && let Some(number) = rest.strip_suffix(",%edi")
        {
            argument = u64::from_str_radix(number, 16).ok();
        }
        if line.contains("<_Znwm") {
            taken = argument;
        }
        if line.contains("call") && line.contains(&format!("{class}C1E")) {
            return taken;
        }
    }
    None
}

/// The size by our compiler and the headers that the shim is compiled with.
fn seen_by_compiler(ws: &Workspace) -> Result<u64> {
    let folder = ws.target()?.join("layout");
    fs::create_dir_all(&folder)?;
    let (source, assembly) = (folder.join("size.cpp"), folder.join("size.s"));
    fs::write(&source, SOURCE)?;
    let include = ws.libtorch().join("include");
    let mut compiler = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "g++".into()));
    compiler.args(["-std=c++17", "-w", "-O0", "-S", "-D_GLIBCXX_USE_CXX11_ABI=1", "-I"]).arg(&include);
    compiler.arg("-I").arg(include.join("torch/csrc/api/include"));
    compiler.arg("-idirafter").arg(ws.root.join("crates/lora-torch/shim/stub"));
    capture(compiler.arg(&source).arg("-o").arg(&assembly))?;
    let text = fs::read_to_string(&assembly)?;
    let behind = text.split_once("lora_size_of_class:").map(|(_, rest)| rest.trim_start());
    match behind.and_then(|rest| rest.strip_prefix(".quad")?.split_whitespace().next()?.parse().ok()) {
        Some(size) => Ok(size),
        None => bail!("the compiler wrote no size into {}", assembly.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_and_sizes_are_read() {
        let line =
            "0000000006a4d0c0 g    DF .text\t00000000000004b3  Base        _ZN4c10d16ProcessGroupGloo5splitERKN3c10";
        assert_eq!(place(line, MAKER), Some((0x6a4_d0c0, 0x4b3)));
        assert_eq!(place(line, "_ZN4c10d16ProcessGroupNCCL5split"), None);
        assert_eq!(place("0000000000000000      DF *UND*\t0 _ZN4c10d16ProcessGroupGloo5split", MAKER), None);
        let code = "  6a:\tmov    $0x20,%edi\n  6b:\tcall   1 <_Znwm@plt>\n  6c:\tcall   2 <_ZN1a1bC1Ev@plt>\n\
                      6d:\tmov    $0x1e8,%edi\n  6e:\tcall   1 <_Znwm@plt>\n  6f:\tmov    $0x7,%edi\n\
                      70:\tcall   3 <_ZN4c10d16ProcessGroupGlooC1ERK@plt>\n  71:\tmov    $0x99,%edi\n  72:\tcall   1 <_Znwm@plt>\n";
        assert_eq!(taken_for(code, CLASS), Some(0x1e8));
        assert_eq!(taken_for(code, "16ProcessGroupNCCL"), None);
        assert_eq!(taken_for("", CLASS), None);
    }
}
