startTips();
startZoom();
startTabs();
