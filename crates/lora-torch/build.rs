//! Compiles the shim against libtorch's headers and lets everything that cargo starts find libtorch.
#![allow(clippy::expect_used)] // a build script that cannot go on can only stop, and says where
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=shim");
    println!("cargo:rerun-if-changed=build.rs");
    // torch-sys (`links = "tch"`) has already found libtorch; it publishes the folder of the libraries.
    let lib = PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys publishes DEP_TCH_LIBTORCH_LIB"));
    let root = lib.parent().expect("libtorch's lib folder has a parent");

    // Cargo adds search paths under `target` to the loader path of whatever it starts (run, test, doctests, benches,
    // dependents without a build script), so a link to the library folder inside OUT_DIR serves them all.
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    let link = out.join("libtorch");
    link_to(&lib, &link);
    println!("cargo:rustc-link-search=native={}", link.display());

    // The text of the kernels that a CUDA device compiles.
    let kernels = fs::read_to_string("shim/device_kernels.cu").expect("shim/device_kernels.cu is there");
    fs::write(out.join("device_kernels.inc"), format!("R\"lora({kernels})lora\"")).expect("OUT_DIR is writable");

    let sources = [
        "device_emulated.cpp",
        "device_kernels.cpp",
        "host.cpp",
        "linear.cpp",
        "pointwise.cpp",
        "attention.cpp",
        "loss.cpp",
        "optim.cpp",
        "product.cpp",
        "runtime.cpp",
        "stored.cpp",
    ]
    .map(|f| Path::new("shim").join(f));
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .flag("-w")
        .opt_level(3)
        // The kernels: threads by libtorch's own pool, loops that vectorise without changing the order of other sums.
        .flag("-fopenmp")
        .flag("-fno-math-errno")
        .flag("-fno-trapping-math")
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        // Products and sums round one after the other, whatever the CPU could do in one.
        .flag("-ffp-contract=off")
        .include(&out)
        .include(root.join("include"))
        .include(root.join("include/torch/csrc/api/include"))
        .files(sources);
    // Loops of our own stand once for each set of instructions; the program asks the CPU before it calls them. Sums are not
    // contracted, so that most numbers have the same bits by each.
    let loops = |name: &str, flags: &[&str], define: Option<&str>| {
        let mut loops = cc::Build::new();
        loops.cpp(true).std("c++17").opt_level(3).flag("-w").flag("-fno-math-errno").flag("-fno-trapping-math");
        loops.flag("-fopenmp-simd").flag("-ffp-contract=off").flags(flags).define("KERNEL_SET", define);
        // Objects are called by their sources, of which one stands for several.
        loops.out_dir(out.join(define.unwrap_or("products")));
        loops.file(Path::new("shim").join(name)).compile_intermediates()
    };
    build.objects(loops("kernels.cpp", &[], Some("BASE")));
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64") && !build.get_compiler().is_like_msvc() {
        build.define("LORA_SGEMM", None).files(["shim/attend.cpp", "shim/sgemm.cpp"]);
        let avx2 = ["-mavx2", "-mfma", "-mf16c"];
        let avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"];
        for (flags, set, product) in [(&avx2[..], "AVX2", "sgemm_avx2.cpp"), (&avx512, "AVX512", "sgemm_avx512.cpp")] {
            build.objects(loops("kernels.cpp", flags, Some(set)));
            build.objects(loops(product, flags, None));
        }
    }
    build.objects(distributed(root).compile_intermediates());
    build.compile("lora_shim");
    for library in ["torch_cpu", "c10", "gomp"] {
        println!("cargo:rustc-link-lib={library}");
    }
}

/// What processes that train together need: libtorch's process group of gloo where it has one, and messages that say so where
/// it has not (docs/adr/0002-stub-headers-of-gloo.md).
fn distributed(root: &Path) -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").flag("-w").opt_level(1).define("_GLIBCXX_USE_CXX11_ABI", "1");
    build.include(root.join("include")).include(root.join("include/torch/csrc/api/include"));
    if has_symbol(&root.join("lib/libtorch_cpu.so"), b"N4c10d16ProcessGroupGlooC1E") {
        // After every other folder: where gloo's own headers are, they are taken.
        build.define("LORA_GLOO", None).flag("-idirafter").flag("shim/stub");
    }
    build.file("shim/distributed.cpp");
    if env::var_os("CARGO_FEATURE_NCCL").is_some() {
        nccl(root, &mut build);
    }
    build
}

/// Exchanges between CUDA devices, where the feature asks for them: libtorch's process group of NCCL. Its header needs those of CUDA
/// and of NCCL, which libtorch does not bring; `LORA_CUDA_INCLUDE` says in which folders they are.
fn nccl(root: &Path, build: &mut cc::Build) {
    const FOLDERS: &str = "LORA_CUDA_INCLUDE";
    println!("cargo:rerun-if-env-changed={FOLDERS}");
    let folders: Vec<PathBuf> = env::var_os(FOLDERS).map(|list| env::split_paths(&list).collect()).unwrap_or_default();
    for header in ["nccl.h", "cuda_runtime_api.h", "crt/host_config.h", "nv/target"] {
        assert!(
            folders.iter().any(|folder| folder.join(header).is_file()),
            "the feature `nccl` needs {header} in a folder of {FOLDERS}: a CUDA toolkit and NCCL have it, and the packages nvidia-nccl-cu13, \
             nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-cuda-cccl"
        );
    }
    let libraries = root.join("lib");
    let cuda = libraries.join("libtorch_cuda.so");
    assert!(cuda.is_file(), "the feature `nccl` needs {}: `cargo xtask setup --cuda` fetches it", cuda.display());
    build.define("LORA_NCCL", None).file("shim/nccl.cpp").includes(&folders);
    for library in ["torch_cuda", "c10_cuda"] {
        println!("cargo:rustc-link-lib={library}");
    }
    // What the headers call of the runtime; it lies beside its headers, or beside libtorch.
    let runtime =
        folders.iter().filter_map(|folder| folder.parent()).map(|parent| parent.join("lib")).chain([libraries]);
    if let Some(folder) = runtime.into_iter().find(|folder| folder.join("libcudart.so.13").is_file()) {
        println!("cargo:rustc-link-search=native={}", folder.display());
        println!("cargo:rustc-link-lib=dylib:+verbatim=libcudart.so.13");
    }
}

/// Whether a library has a symbol of C++ (`_Z` and more) that goes on so behind its `Z`. Parts that end with that byte are few, and
/// looking for a byte is fast even in a build script, which is not optimised.
fn has_symbol(library: &Path, rest: &[u8]) -> bool {
    let Ok(file) = fs::File::open(library) else { return false };
    let (mut reader, mut part) = (BufReader::with_capacity(1 << 20, file), Vec::new());
    while matches!(reader.read_until(b'Z', &mut part), Ok(1..)) {
        if part.starts_with(rest) {
            return true;
        }
        part.clear();
    }
    false
}

fn link_to(target: &Path, link: &Path) {
    if fs::read_link(link).is_ok_and(|t| t == target) {
        return;
    }
    let _ = fs::remove_file(link);
    #[cfg(unix)]
    std::os::unix::fs::symlink(target, link).expect("OUT_DIR is writable");
}
