#!/bin/sh
# Remove from the site-packages folder $1 what serving never reads: a good third of a plain installation. A name that is
# not there ends this with an error, because then a package has changed and its line is out of date. warm.py then checks
# that the app still works by generating a story.
set -eu
cd "$1"
du -sm .
rm -r hf_xet # uploads to and fast downloads from the Hugging Face hub
rm -r onnxruntime/capi/libonnxruntime.so* # for programs in C; the Python module holds its own copy
rm -r onnxruntime/transformers onnxruntime/quantization # makes and converts graphs; ours are exported already
rm -r gradio/templates/node # renders pages in Node.js, which is off and not installed
rm -r gradio/templates/frontend/static/ffmpeg # cuts videos in the browser; the page shows none
rm -r gradio/templates/frontend/static/bokeh # draws Bokeh plots, and Bokeh is not installed
rm -r gradio/templates/frontend/static/fonts # fonts of Gradio's own themes; the page's theme uses none
rm -r gradio/templates/frontend/assets/PlotlyPlot-* # draws Plotly plots, and Plotly is not installed
rm -r gradio/media_assets # sample pictures, sounds and films for Gradio's own demos
rm numpy/_core/_simd*.so # for tests of numpy's vector code
rm pillow.libs/libavif-* # pictures in AVIF; the page takes no pictures
rm -r google/* # reads graphs in Python; ONNX Runtime does so in C++
rm pygments/lexers/[a-z]*.py # highlights code in 500 languages; nothing here shows code
find . -type d -name tests -prune -exec rm -r {} + # test suites
find . -type f -name '*.py[ix]' -delete # types for editors, and Cython sources
du -sm .
