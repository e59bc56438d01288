//! Compiles the schema without `protoc`.

use std::{env, error::Error, fs, path::PathBuf};

const FILES: [&str; 8] = [
    "streamer/common/v1/common.proto",
    "streamer/router/v1/router.proto",
    "streamer/progress/v1/progress.proto",
    "streamer/processor/v1/worker.proto",
    "streamer/connections/v1/connections.proto",
    "streamer/internal/v1/internal.proto",
    "google/longrunning/operations.proto",
    // Error details; included so that clients can decode them through reflection.
    "google/rpc/error_details.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=streamer");
    println!("cargo:rerun-if-changed=google");
    let out = PathBuf::from(env::var("OUT_DIR")?);

    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_source_info(true).include_imports(true).open_files(FILES)?;
    let compiled = compiler.file_descriptor_set();

    // Reflection serves the public packages only.
    let mut public = compiled.clone();
    public.file.retain(|file| !file.package().starts_with("streamer.internal"));
    for file in &mut public.file {
        file.source_code_info = None;
    }
    fs::write(out.join("public_descriptor.bin"), prost::Message::encode_to_vec(&public))?;

    tonic_prost_build::configure()
        .bytes(".")
        .build_transport(false)
        .codec_path("crate::codec::SmallBufferCodec")
        .compile_fds(compiled)?;
    Ok(())
}
