//! Embeds the text of `kernels/` in the library, and reports faults in it at build time.
//!
//! Nothing of CUDA is needed to build: the text is compiled at run time, for the device or for the emulator.

#[path = "src/device/scan.rs"]
#[allow(dead_code, reason = "the library looks at more of a kernel than the build does")]
mod scan;

use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

fn main() {
    let root = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("set by cargo")).join("kernels");
    println!("cargo::rerun-if-changed={}", root.display());
    println!("cargo::rerun-if-changed=src/device/scan.rs");
    let mut out = String::from("/// Path below `kernels/` and text of every file there.\n");
    out.push_str("static EMBEDDED: &[(&str, &str)] = &[\n");
    for name in scan::list(&root).expect("kernels/ is part of the package") {
        let path = root.join(&name);
        let text = fs::read_to_string(&path).expect("kernel files are UTF-8");
        if let Err(fault) = scan::scan(&name, &text) {
            panic!("kernels/{name}: {fault}");
        }
        writeln!(out, "    ({name:?}, include_str!({path:?})),").expect("writing to a string");
    }
    out.push_str("];\n");
    let to = Path::new(&env::var("OUT_DIR").expect("set by cargo")).join("kernels.rs");
    fs::write(to, out).expect("OUT_DIR can be written");
}
